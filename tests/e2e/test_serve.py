"""Serving over real stages: many requests at once."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.e2e.processes import state, stopped
from tests.e2e.test_users import connections, raw, read_all, request

PROMPTS = [f"Request number {index} says hello" for index in range(8)]


@pytest.fixture
def serve(cluster):
    """Starts a server with two supervised workers."""
    cluster.plan(2)
    return lambda *extra, **options: cluster.serve(
        "--supervise", "--context", "512", "--hang-timeout", "3", *extra, **options
    )


@pytest.fixture
def serve_by_hand(cluster):
    """Starts a server in front of two workers, for what has nothing to do with who starts them."""
    cluster.plan(2)
    for idx in range(2):
        cluster.start_worker(idx)
    return lambda *extra, **options: cluster.serve("--context", "512", *extra, **options)


def test_concurrent_requests_get_what_each_gets_alone(serve_by_hand):
    server = serve_by_hand()
    alone = [server.text(prompt, 40) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: server.text(prompt, 40), PROMPTS))
    assert together == alone


def test_workers_run_nothing_that_lies_where_the_server_was_started(
    serve, cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster, "_parent", None)  # no fork: what it imports is the matter
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    for name in ("json", "pipeline", "torch", "trio", "typer"):
        (downloads / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    server = serve(cwd=downloads)
    server.text("Hi", 5)
    os.kill(server.workers()[0], signal.SIGKILL)
    server.text("Hi", 5)
    assert not (tmp_path / "mark").exists()


def test_top_shows_every_stage_and_says_what_is_wrong(serve_by_hand, cluster):
    key = cluster.directory / "key"
    key.write_text("sk-right\n")
    server = serve_by_hand("--api-key-file", key, headers={"authorization": "Bearer sk-right"})
    server.text("Hi", 50)
    top = ("top", "--url", server.url)
    shown = cluster.orch_command(*top, "--api-key-file", key, "--once")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[0].startswith("model  ready  running 0/8")
    kernels = server.pipeline()["stages"][0]["kernels"]
    assert kernels in {"native", "torch"}
    assert [line.split()[:4] for line in lines[-2:]] == [
        ["0", "0-1", "float32", kernels],
        ["1", "2-3", "float32", kernels],
    ]
    assert "p50" in lines[1]
    key.write_text("sk-wrong\n")
    refused = cluster.orch_command(*top, "--api-key-file", key, "--once")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--api-key-file" in refused.stderr
    keyless = cluster.orch_command(*top)
    assert keyless.returncode == 2


def test_json_logs_follow_a_request_by_its_id_and_never_quote_it(serve):
    server = serve("--log-format", "json", "--verbose")
    answer = server.post(server.wish("xyzzy", 12))
    server.wait_for(lambda: server.events("request"))
    os.kill(server.workers()[1], signal.SIGKILL)
    server.wait_for_log('"worker_died"', 1)
    log = server.log()
    lines = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger"} <= line.keys() for line in lines)
    events = [
        line["event"] for line in lines if line.get("request_id") == answer.headers["x-request-id"]
    ]
    assert events == ["generation_started", "generation_ended", "request"]
    assert "pipeline.stage.model_config" in {line["logger"] for line in lines}
    assert "xyzzy" not in log
    assert answer.json()["choices"][0]["text"] not in log


def test_an_error_is_a_json_line_where_all_lines_are(cluster):
    cluster.plan(1)
    result = cluster.orch("Hello", "--connect-timeout", "0.3", "--log-format", "json")
    assert result.returncode == 1
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert (lines[-1]["event"], lines[-1]["code"]) == ("failed", 1)
    assert "gave up" in lines[-1]["error"]
    assert result.stdout == ""


def is_running(pid):
    """Whether a process is more than what its new parent has yet to clear away."""
    try:
        return state(pid) not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(process):
    found = [process.pid]
    for pid in found:
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):  # of each thread
            with suppress(OSError):  # it has ended meanwhile
                found += tasks.read_text().split()
    return found[1:]


def test_a_killed_server_leaves_no_worker_behind(serve):
    server = serve()
    assert sorted(server.workers()) == [0, 1]
    # Two workers and what they are forks of, and what renders chats.
    pids = server.wait_for(lambda: pids if len(pids := descendants(server.process)) == 4 else None)
    server.process.kill()
    server.process.wait()
    for _ in range(600):
        if not any(map(is_running, pids)):
            break
        time.sleep(0.1)
    assert not any(map(is_running, pids))


def test_clients_before_a_pipeline_that_is_not_there_are_told_so_until_it_is(cluster):
    cluster.plan(1)
    server = cluster.begin_to_serve("--connect-timeout", "1")
    refused = ask(server, "x", 4)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "pipeline_unavailable")
    assert server.get("/health").json()["status"] == "away"
    cluster.start_worker(0)
    server.wait_for(server.is_ready)
    assert server.text("x", 4)
    assert "Traceback" not in server.log()


def test_clients_before_a_pipeline_that_cannot_stand_are_told_so_as_it_ends(cluster):
    cluster.plan(1)
    cluster.edit(lambda fields: fields.update(model_version="2"), cluster.directory / "2.json")
    server = cluster.begin_to_serve("--connect-timeout", "1")
    health = server.get("/health")
    assert health.status_code == 503
    assert health.json()["status"] in {"starting", "away"}
    with raw(server, request(server.wish("x", 4))) as sock:
        server.wait_for(lambda: connections(server) >= 2)
        cluster.start_worker(0, manifest=cluster.directory / "2.json")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"code":"pipeline_unavailable"' in answer
    assert server.process.wait(300) != 0
    assert "Traceback" not in server.log()


def ask(server, prompt, max_tokens):
    body = server.wish(prompt, max_tokens)
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)


def test_a_server_told_to_stop_finishes_what_runs_and_takes_no_more(serve_by_hand, cluster):
    server = serve_by_hand("--grace", "600")
    expected = [server.text(prompt, 200) for prompt in PROMPTS]

    def stream(prompt):
        body = server.wish(prompt, 200, stream=True)
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=300) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        with stopped(cluster.workers[1].pid):
            streams = [pool.submit(stream, prompt) for prompt in PROMPTS]
            server.wait_for(lambda: server.num_taken() == len(PROMPTS))
            server.process.terminate()
            server.wait_for(lambda: server.get("/health").json()["status"] == "leaving")
            refused = ask(server, "x", 4)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
        assert [each.result() for each in streams] == expected
    assert server.process.wait(300) == 0


def test_a_server_out_of_grace_ends_its_streams_with_an_error_and_done(serve_by_hand):
    server = serve_by_hand("--context", "4096", "--grace", "0.01")
    body = server.wish("x", 4000, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        next(lines)
        server.process.terminate()
        *_, error, done = lines
    assert json.loads(error)["error"]["code"] == "server_stopping"
    assert done == "[DONE]"
    assert server.process.wait(300) == 0


def test_a_stream_under_way_ends_with_the_failure_of_its_pipeline(cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    server = cluster.serve("--connect-timeout", "2", "--exit-on-loss")
    body = server.wish("x", 4000, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as stream:
        lines = stream.iter_lines()
        next(lines)
        cluster.workers[0].kill()
        *_, last, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "pipeline_unavailable"
    assert server.process.wait(300) == 1


def test_a_certificate_that_cannot_be_used_is_one_line(cluster):
    cluster.plan(1)
    serve = ("serve", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--dev")
    for files in (("--tls-cert", "/nowhere"), ("--tls-cert", "/nowhere", "--tls-key", "/nowhere")):
        done = cluster.orch_command(*serve, *files)
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if line.startswith("pipeline-orch: ")]
        assert len(errors) == 1
        assert "Traceback" not in done.stderr


def test_a_server_takes_the_directory_of_shards_for_the_model(cluster):
    cluster.plan(2)
    whole = cluster.orch_over(2)
    assert whole.returncode == 0, whole.stderr
    shards = cluster.directory / "shards"
    cut = cluster.orch_command(
        "shard", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--out", shards
    )
    assert cut.returncode == 0, cut.stderr
    cluster.model_dir, cluster.manifest = shards, shards / "manifest.json"
    from_shards = cluster.orch("Hello there", "--supervise", "--model-dir", shards)
    assert from_shards.returncode == 0, from_shards.stderr
    assert from_shards.stdout == whole.stdout
    server = cluster.serve("--supervise", "--context", "128")
    assert server.text("Hello there", 4)
