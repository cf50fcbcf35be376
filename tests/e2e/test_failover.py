"""Stages die, hang and lose each other while they serve: only what is lost is replaced."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from pipeline.kernels.kernel_selection import why_not_native
from tests.e2e.processes import stopped
from tests.e2e.texts_under_way import (
    REQUESTS,
    alone,
    complete,
    completing,
    expect_the_same_whoever_dies,
    undisturbed,
)

RELAY = Path(sys.executable).parent / "pipeline-relay"


@pytest.fixture
def serve(cluster):
    """Starts stages by hand and a server in front of them."""

    def start(stages, *extra, flags=None):
        if not cluster.workers:
            cluster.plan(stages)
            for idx in range(stages):
                cluster.start_worker(idx, *(flags or {}).get(idx, ()))
        return cluster.serve("--context", "512", *extra)

    return start


def sessions(cluster, idx):
    return cluster.log(idx).count("event=session_started")


def replays(cluster, idx):
    return cluster.log(idx).count("event=replayed")


@pytest.mark.parametrize(
    "victims",
    [
        [{0}, {1}, {1, 2}, {0, 1, 2}],
        pytest.param([{2}, {0, 1}, {0, 2}], marks=pytest.mark.slow),
    ],
    ids=["some", "others"],
)
def test_only_the_dead_are_replaced_and_every_text_is_the_undisturbed_one(cluster, serve, victims):
    server = serve(3)
    expected = undisturbed(server)
    begun, replayed = [1, 1, 1], [0, 0, 0]
    for count, dead in enumerate(victims, start=1):
        with completing(server, cluster.workers[min(dead)].pid) as texts:
            for idx in dead:
                cluster.workers[idx].kill()
            for idx in dead:
                cluster.start_worker(idx)
        assert texts == expected, dead
        server.wait_for_log("event=failover_complete", count)
        for idx in range(3):
            begun[idx] += idx in dead
            # Each run of new stages is rebuilt by the living one before it, by nobody else.
            replayed[idx] += idx not in dead and idx + 1 in dead
            assert sessions(cluster, idx) == begun[idx], (dead, idx)
            assert replays(cluster, idx) == replayed[idx], (dead, idx)


@pytest.mark.slow
def test_a_stage_that_hangs_is_replaced_by_itself_once_it_goes_on(cluster, serve):
    server = serve(3, "--hang-timeout", "5")
    expected = undisturbed(server)
    for victim in range(3):
        before = [sessions(cluster, idx) for idx in range(3)]
        with completing(server, cluster.workers[victim].pid) as texts:
            server.wait_for_log(f"stage {victim} is lost", 1)
        assert texts == expected
        for idx in range(3):
            assert (sessions(cluster, idx) > before[idx]) is (idx == victim)


@contextmanager
def relayed(cluster, serve, *extra):
    """A relay between two stages, its command, and the server in front of them."""
    cluster.plan(2)
    base = cluster.base_port
    command = [RELAY, "--map", f"127.0.0.1:{base + 5}=127.0.0.1:{base + 11}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as relay:
        try:
            cluster.start_worker(0, "--data-out-target", f"127.0.0.1:{base + 5}")
            cluster.start_worker(1)
            yield relay, command, serve(2, *extra)
        finally:
            relay.kill()


def test_a_relay_cut_for_seconds_costs_no_stage_and_no_state(cluster, serve):
    with relayed(cluster, serve) as (relay, command, server):
        expected = undisturbed(server)
        with completing(server, relay.pid) as texts:
            relay.kill()
            relay.wait()
            time.sleep(2)
            assert texts == [None] * len(REQUESTS)
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as successor:
                server.wait_for_log("event=failover_complete", 1)
                server.wait_for(lambda: None not in texts)
                successor.terminate()
    assert texts == expected
    assert [sessions(cluster, idx) for idx in range(2)] == [1, 1]
    assert replays(cluster, 0) == 0
    assert cluster.log(1).count("event=rewound") >= 1


@pytest.mark.slow
def test_a_link_on_which_nothing_moves_any_more_is_made_anew(cluster, serve):
    """Its ends see no error, and every stage answers: only the steps under way do not move."""
    with relayed(cluster, serve, "--hang-timeout", "5") as (relay, _, server):
        expected = undisturbed(server)
        with completing(server, relay.pid) as texts:
            server.wait_for_log("event=failover_started", 1)
    assert texts == expected
    assert [sessions(cluster, idx) for idx in range(2)] == [1, 1]


def test_a_restarted_orchestrator_is_served_at_once(cluster, serve):
    server = serve(2)
    expected = complete(server, 0)
    body = server.wish("x", 400)
    with ThreadPoolExecutor() as pool, stopped(cluster.workers[1].pid):
        cut = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=300)
        server.wait_for(server.num_taken)
        server.process.kill()
        assert isinstance(cut.exception(), httpx.TransportError)
    server.process.wait()
    successor = serve(2)
    assert complete(successor, 0) == expected
    assert [sessions(cluster, idx) for idx in range(2)] == [2, 2]
    assert "busy" not in cluster.log(0) + cluster.log(1)


@pytest.mark.slow  # who is rebuilt from whom is orchestrator/test_replay_plan.py's matter
def test_a_stage_without_room_to_keep_activations_is_rebuilt_with_the_one_behind(cluster, serve):
    # Of 4 stages with a layer each: 4,194 tokens of keys and values, half of them with activations.
    server = serve(
        4, "--context", "600", "--prefix-share", "0", flags={1: ("--kv-memory", "0.001")}
    )
    requests = [{"prompt": [20 + index] * 340} for index in range(7)]
    expected = alone(server, requests)
    with completing(server, cluster.workers[2].pid, requests) as texts:
        cluster.workers[2].kill()
        cluster.start_worker(2)
    assert texts == expected
    assert [sessions(cluster, idx) for idx in range(4)] == [1, 1, 2, 1]
    assert [replays(cluster, idx) for idx in range(4)] == [1, 0, 0, 0]


def test_a_stage_that_stays_away_is_awaited_and_served_again_when_it_is_back(cluster, serve):
    server = serve(2, "--connect-timeout", "1")
    expected = complete(server, 0)
    body = server.wish("x", 400)
    with ThreadPoolExecutor() as pool, stopped(cluster.workers[1].pid):
        waiting = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=300)
        server.wait_for(server.num_taken)
        cluster.workers[1].kill()
        assert waiting.result().status_code == 503
    for pause in (2, 0):
        refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert "stage 1" in refused.json()["error"]["message"]
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "away")
        (awaited,) = health.json()["awaited"]
        assert awaited["stage"] == 1
        time.sleep(pause)
    assert awaited["seconds"] >= 2
    assert server.get("/livez").status_code == 200
    cluster.start_worker(1)
    server.wait_for(server.is_ready)
    assert complete(server, 0) == expected


def test_a_stage_that_stays_away_ends_a_server_that_is_to_exit_with_one_line(cluster, serve):
    server = serve(2, "--connect-timeout", "2", "--exit-on-loss")
    cluster.workers[1].kill()
    assert server.process.wait(300) == 1
    (line,) = [line for line in server.log().splitlines() if "error:" in line and "orch" in line]
    assert "gave up after 2 s" in line
    assert "stage 1" in line


# One that hangs by hand is seen to above, and that a supervisor ends it in its own tests.
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)],
    ids=["killed", "hangs"],
)
def test_a_supervised_stage_is_replaced_and_no_other(cluster, serve, number):
    cluster.plan(3)
    server = cluster.serve("--context", "512", "--supervise", "--hang-timeout", "4")
    expected = undisturbed(server)
    before = server.workers()
    expect_the_same_whoever_dies(server, expected, number)
    after = server.workers()
    assert not set(before.values()) & set(after.values())
    assert server.log().count("event=worker_started") == 6
    is_kept = why_not_native() is None and hasattr(os, "memfd_create")
    # They are of one file, which one of them reads for all.
    assert server.log().count("event=weights_loaded") == (1 if is_kept else 6)
    # What it was killed in the middle of alone is computed again.
    assert server.log().count("event=went_on") == (3 if is_kept else 0)
    server.stop()
    pids = {*before.values(), *after.values()}
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_verified_weights_outlive_a_worker_and_the_file_they_came_from(cluster, serve, precision):
    cluster.plan(3)
    server = cluster.serve("--context", "512", "--supervise", "--dtype", precision)
    expected = [complete(server, index) for index in range(len(REQUESTS))]
    (path,) = cluster.model_dir.glob("*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    if why_not_native() is None and hasattr(os, "memfd_create"):
        expect_the_same_whoever_dies(server, expected)
    server.stop()
    server = cluster.begin_to_serve("--supervise", "--dtype", precision)
    assert server.process.wait(300) != 0
    assert f"{path.name} has SHA-256" in server.log()


def silent_crowd(cluster, number):
    """So many connections to every port of every stage, which say nothing and stay."""
    stages = json.loads(cluster.manifest.read_text())["stages"]
    crowd = ExitStack()
    for stage in stages:
        for name in ("control", "data_in"):
            host, _, port = stage["endpoint"][name]["addr"].rpartition(":")
            for _ in range(number):
                crowd.enter_context(socket.create_connection((host, int(port)), timeout=300))
    return crowd


@pytest.mark.slow  # that crowds keep nobody out is protocol/test_peer_connections.py's matter
def test_a_crowd_of_silent_connections_costs_no_healthy_worker_its_life(cluster, serve):
    cluster.plan(2)
    server = cluster.serve("--context", "512", "--supervise")
    expected = undisturbed(server)
    before = server.workers()
    with silent_crowd(cluster, 100):
        os.kill(before[0], signal.SIGKILL)
        server.wait_for_log("event=failover_started", 1)
        assert [complete(server, index) for index in range(len(REQUESTS))] == expected
        server.wait_for_log("event=failover_complete", 1)
    after = server.workers()
    assert after[1] == before[1]
    assert server.log().count("event=worker_started") == 3
