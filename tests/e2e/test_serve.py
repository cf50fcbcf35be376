"""Serving over real stages: many requests at once."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest

PROMPTS = [f"Request number {index} says hello" for index in range(8)]


@pytest.fixture
def server(cluster):
    """Starts `pipeline-orch serve` with supervised workers; returns its base URL and process."""
    cluster.plan(2)
    processes = []

    def start(*extra):
        log = cluster.directory / "serve.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [cluster.bin / "pipeline-orch", "serve", "--manifest", cluster.manifest,
                 "--model-dir", cluster.model_dir, "--supervise", "--port", "0", "--dev",
                 "--max-batch", "8", "--context", "512", "--hang-timeout", "3", *extra],
                stdout=file, stderr=file, env=cluster.environment,
            )  # fmt: skip
        processes.append(process)
        url = None
        for _ in range(600):
            url = url or re.search(r"url\W+(http://[\w.:]+)", log.read_text())
            if url and is_ready(url[1]):
                return url[1], process
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def is_ready(url):
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def workers_of(process):
    """Process ids of the server's children by stage."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rsplit(") ", 1)[1].split()[1]
            words = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue  # it has ended meanwhile
        if int(parent) == process.pid and "--stage-idx" in words:
            found[int(words[words.index("--stage-idx") + 1])] = int(entry.name)
    return found


def complete(url, prompt, max_tokens=40):
    body = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True}  # fmt: skip
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def complete_all(url, prompts, max_tokens=40):
    texts = [None] * len(prompts)

    def run(index):
        texts[index] = complete(url, prompts[index], max_tokens)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    return texts, threads


def test_concurrent_requests_get_what_each_gets_alone(server):
    url, _ = server()
    alone = [complete(url, prompt) for prompt in PROMPTS]
    together, threads = complete_all(url, PROMPTS)
    for thread in threads:
        thread.join(120)
    assert together == alone


def test_top_shows_every_stage_and_says_what_is_wrong(server, cluster):
    key = cluster.directory / "key"
    key.write_text("sk-right\n")
    url, _ = server("--api-key-file", key)
    headers = {"authorization": "Bearer sk-right"}
    body = {"model": "model", "prompt": "Hi", "max_tokens": 50, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()
    shown = cluster.orch_command("top", "--url", url, "--api-key-file", key, "--once")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[0].startswith("model  ready  running 0/8")
    assert [line.split()[:4] for line in lines[-2:]] == [
        ["0", "0-1", "float32", "ready"],
        ["1", "2-3", "float32", "ready"],
    ]
    assert "p50" in lines[1]
    key.write_text("sk-wrong\n")
    refused = cluster.orch_command("top", "--url", url, "--api-key-file", key, "--once")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--api-key-file" in refused.stderr
    keyless = cluster.orch_command("top", "--url", url)
    assert keyless.returncode == 2


def test_json_logs_follow_a_request_by_its_id_and_never_quote_it(server, cluster):
    url, process = server("--log-format", "json", "--verbose")
    body = {"model": "model", "prompt": "xyzzy", "max_tokens": 12, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200
    os.kill(workers_of(process)[1], signal.SIGKILL)
    wait = time.monotonic() + 20
    while '"worker_died"' not in (log := (cluster.directory / "serve.log").read_text()):
        assert time.monotonic() < wait
        time.sleep(0.1)
    lines = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger"} <= line.keys() for line in lines)
    events = [
        line["event"] for line in lines if line.get("request_id") == answer.headers["x-request-id"]
    ]
    assert events == ["generation_started", "generation_ended", "request"]
    assert "pipeline.cli.stage_worker" in {line["logger"] for line in lines}
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
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_a_killed_server_leaves_no_worker_behind(server, cluster):
    _, process = server()
    assert sorted(workers_of(process)) == [0, 1]
    for _ in range(200):
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")  # of each thread
        pids = [pid for task in tasks for pid in task.read_text().split()]
        if len(pids) == 3:
            break
        time.sleep(0.1)
    assert len(pids) == 3, "two workers and a spare one"
    process.kill()
    process.wait()
    for _ in range(300):  # a spare one may still be importing
        if not any(map(is_running, pids)):
            break
        time.sleep(0.1)
    assert not any(map(is_running, pids))
    process.returncode = 0  # the fixture's own end has nothing left to do
