"""How real processes find each other: late, elsewhere, where they must not, or not at all."""

import json
import os
import re
import socket

import httpx
import pytest

from pipeline.kernels.kernel_selection import why_not_native

ONE_LINE = ("Hello there", "--max-tokens", "5", "--ignore-eos")


def error_of(done, code):
    """The one line that says why."""
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "pipeline-orch: error:" in line]
    return line


def move(cluster, idx):
    """Correct the manifest's file for a stage that is at other ports from now on: its flags."""
    port = cluster.base_port + 50 + 10 * idx
    control, data_in = ({"type": "tcp", "addr": f"127.0.0.1:{port + i}"} for i in range(2))

    def change(raw):
        stages = raw["stages"]
        stages[idx]["endpoint"] |= {"control": control, "data_in": data_in}
        if idx:
            stages[idx - 1]["endpoint"]["data_out"] = data_in

    cluster.edit(change, cluster.directory / "moved.json").replace(cluster.manifest)
    return ("--control-listen", control["addr"], "--data-in-listen", data_in["addr"])


# tests/pipeline/orchestrator/test_moving.py has all of them, in one process.
@pytest.mark.parametrize(
    "idx", [1, *(pytest.param(each, marks=pytest.mark.slow) for each in (0, 2))]
)
def test_a_stage_that_comes_back_elsewhere_is_found_once_the_manifest_says_so(cluster, idx):
    cluster.plan(3)
    for each in range(3):
        cluster.start_worker(each, "--allow-dial", "127.0.0.0/8")
    server = cluster.serve("--context", "512")
    expected = server.text("Hello there", 40)
    cluster.workers[idx].kill()
    cluster.start_worker(idx, *move(cluster, idx), "--allow-dial", "127.0.0.0/8")
    assert server.text("Hello there", 40) == expected
    assert "event=addresses_read" in server.log()
    sessions = [cluster.log(each).count("event=session_started") for each in range(3)]
    assert sessions == [1 + (each == idx) for each in range(3)]


def test_a_stage_dials_elsewhere_only_where_it_is_allowed_to(cluster):
    cluster.plan(2)
    own = cluster.edit(lambda raw: None, cluster.directory / "own.json")
    cluster.start_worker(0, manifest=own)
    port = cluster.base_port

    def elsewhere(raw):
        raw["stages"][0]["endpoint"]["data_out"]["addr"] = f"127.0.0.2:{port + 7}"

    cluster.edit(elsewhere)
    cluster.start_worker(1)
    line = error_of(cluster.orch(*ONE_LINE), 2)
    assert f"stage 0 may not dial tcp:127.0.0.2:{port + 7}; allow it with --allow-dial" in line
    cluster.workers[0].terminate()
    cluster.start_worker(0, "--allow-dial", "127.0.0.2", manifest=own)
    line = error_of(cluster.orch(*ONE_LINE, "--connect-timeout", "3"), 1)
    assert "gave up after 3 s" in line  # it dials, and nobody is there


def test_what_stages_have_no_memory_for_is_refused_at_once_in_one_line(cluster):
    cluster.plan(2)
    # Room for 2,097 tokens: 2 layers, 2 heads of 16, keys and values.
    for idx in range(2):
        cluster.start_worker(idx, "--kv-memory", "0.001")
    serve = cluster.orch_command(
        *("serve", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--dev"),
        *("--port", "0", "--context", "2098"),
    )
    line = error_of(serve, 2)
    assert "KV memory for 2097 tokens in all, and a request is to have 2098" in line
    assert "--context" in line
    assert len(serve.stderr.splitlines()) < 8


def test_whatever_the_model_allows_requests_may_have_what_stages_have_memory_for(cluster):
    cluster.plan(2)
    for idx, size in enumerate(("0.001", "0.002")):
        cluster.start_worker(idx, "--kv-memory", size)
    server = cluster.serve("--max-batch", "64")
    told = "context 2097, KV 0.0 GB for 2,097 tokens of up to 64 requests"
    assert told in server.log()
    assert server.pipeline()["engine"]["max_seq_len"] == 2097
    assert server.text([7] * 2090, 5)
    refused = httpx.post(
        f"{server.url}/v1/completions", json=server.wish([7] * 2097, 1), timeout=300
    )
    assert refused.status_code == 400
    assert "2097" in refused.json()["error"]["message"]
    server.stop()


def test_a_prompt_asks_for_no_more_room_than_it_takes(cluster):
    cluster.plan(1)
    cluster.start_worker(0, "--kv-memory", "0.001")
    longest = json.loads(cluster.manifest.read_text())["activation_spec"]["max_seq_len"]
    done = cluster.orch(*ONE_LINE)
    assert done.returncode == 0, done.stderr
    assert cluster.orch(*ONE_LINE, "--context", "64").stdout == done.stdout
    assert "--context" in error_of(cluster.orch(*ONE_LINE, "--context", str(longest)), 2)
    line = error_of(cluster.orch(*ONE_LINE, "--context", str(longest + 1)), 2)
    assert f"more than the model's {longest}" in line
    assert "context holds 2" in error_of(cluster.orch("Hello there", "--context", "2"), 2)


def test_workers_that_load_for_longer_than_patience_lasts_are_waited_for(cluster):
    """Importing alone takes them longer."""
    cluster.plan(1)
    done = cluster.orch(
        *ONE_LINE, "--supervise", "--model-dir", cluster.model_dir, "--connect-timeout", "1"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["--data-out-port", "--data-out-listen"])
def test_workers_started_here_are_told_where_else_results_go(cluster, flag):
    cluster.plan(1)
    port = cluster.base_port + 5  # not the manifest's
    last = json.loads(cluster.manifest.read_text())["stages"][0]["endpoint"]
    host, _, named = last["data_out"]["addr"].rpartition(":")
    with socket.create_server((host, int(named))):  # another's: nothing would come back from it
        done = cluster.orch(
            *ONE_LINE, "--supervise", "--model-dir", cluster.model_dir, "--connect-timeout", "5",
            flag, f"127.0.0.1:{port}" if flag == "--data-out-listen" else str(port),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_worker_that_is_stuck_while_it_loads_is_given_up(cluster):
    cluster.plan(1)
    config = cluster.model_dir / "config.json"
    config.unlink()
    os.mkfifo(config)  # opening it waits for a writer
    done = cluster.orch(
        *ONE_LINE, "--supervise", "--model-dir", cluster.model_dir, "--connect-timeout", "2"
    )
    line = error_of(done, 1)
    assert "gave up after 2 s: stage 0's control channel" in line
    assert "not up" in line


def test_serving_is_said_when_requests_can_be_served(cluster):
    cluster.plan(1)
    server = cluster.serve("--supervise", "--context", "256")
    server.wait_for_log("event=serving", 1)
    log = server.log()
    assert log.index("event=gateway_started") < log.index("event=serving")
    assert re.search(r"event=serving url=http://\S+ model=model", log)
    os.kill(server.workers()[0], 9)
    server.wait_for_log("event=failover_complete", 1)
    assert server.log().count("event=serving") == 1


def test_workers_started_here_compute_as_they_are_told(cluster):
    cluster.plan(2)
    cpu = min(os.sched_getaffinity(0))
    server = cluster.serve(
        *("--supervise", "--context", "256", "--kernels", "torch", "--dtype", "int8"),
        *("--kv-memory", "0.25", "--device", "cpu", "--cpus", f"{cpu}/{cpu}"),
    )
    for pid in server.workers().values():
        assert os.sched_getaffinity(pid) == {cpu}
    stages = server.pipeline()["stages"]
    assert [(each["precision"], each["kernels"]) for each in stages] == [("int8", "torch")] * 2
    server.wait_for_log("event=slow_kernels stages=0,1 kernels=torch", 1)


@pytest.mark.skipif(why_not_native() is not None, reason="no native kernels here")
def test_fast_kernels_are_not_complained_of(cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    assert "slow_kernels" not in cluster.orch(*ONE_LINE).stderr


def test_options_for_workers_are_refused_where_none_is_started(cluster):
    cluster.plan(1)
    for flag, value in (("--dtype", "int8"), ("--threads", "2"), ("--cpus", "0")):
        line = error_of(cluster.orch(*ONE_LINE, flag, value), 2)
        assert flag in line
        assert "--supervise" in line
