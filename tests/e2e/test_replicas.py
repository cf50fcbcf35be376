"""Several pipelines behind one server: they are renewed, and die, while clients go on asking."""

import json
import os
import signal

import httpx
import pytest

from tests.e2e.lasting_clients import Clients

pytestmark = pytest.mark.slow

NUM_CLIENTS = 8


@pytest.fixture
def server(cluster):
    cluster.plan(2)
    flags = ("--supervise", "--replicas", "2", "--context", "512", "--threads", "1")
    server = cluster.serve(*flags, "--max-batch", "4", "--log-format", "json")
    server.wait_for(lambda: states(server) == ["ready", "ready"])
    return server


def states(server):
    return [each["state"] for each in server.pipeline()["replicas"]]


def where(server):
    """Every stage's address."""
    stages = server.pipeline()["stages"]
    return {(each["replica"], each["stage_idx"]): each["address"] for each in stages}


def test_pipelines_are_renewed_under_load_and_no_request_is_lost(server):
    before = where(server)
    assert len(set(before.values())) == 4
    expected, _ = Clients(server, NUM_CLIENTS).ended()
    assert all(each["num_tokens"] for each in server.pipeline()["replicas"])
    clients = Clients(server, NUM_CLIENTS)
    clients.wait_for(20 * NUM_CLIENTS)
    server.process.send_signal(signal.SIGUSR1)
    for idx in range(2):
        server.wait_for(lambda: len(server.events("replica_renewed")) > idx)  # noqa: B023 - now
        assert server.is_ready()
    texts, _ = clients.ended()
    assert texts == expected
    after = where(server)
    assert all(after[stage] != before[stage] for stage in before)
    metrics = server.get("/metrics").text
    for (replica, stage), address in after.items():
        labels = f'address="{address}",replica="{replica}",stage="{stage}"'
        assert f"veilpipe_stage_info{{{labels}}} 1.0" in metrics
    server.stop()


def test_what_cannot_replace_a_pipeline_is_awaited_while_another_serves(server, cluster):
    expected = server.text("Hello", 20)
    config = cluster.model_dir / "config.json"
    text = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(text), "hidden_size": 7}))
        server.process.send_signal(signal.SIGUSR1)
        server.wait_for(lambda: server.events("replica_not_renewed"))
        assert "Traceback" not in server.log()
        assert states(server)[1] == "ready"
        assert server.text("Hello", 20) == expected
    finally:
        config.write_text(text)
    server.wait_for(lambda: len(server.events("replica_renewed")) == 2)
    assert server.text("Hello", 20) == expected
    server.stop()


def test_a_pipeline_that_loses_a_stage_costs_the_other_nothing(server):
    expected, _ = Clients(server, NUM_CLIENTS).ended()
    clients = Clients(server, NUM_CLIENTS)
    clients.wait_for(20 * NUM_CLIENTS)
    num_failovers = server.pipeline()["engine"]["num_failovers"]
    (pid, *_) = [each["pid"] for each in server.events("worker_started")]
    os.kill(int(pid), signal.SIGKILL)
    server.wait_for(lambda: server.pipeline()["engine"]["num_failovers"] > num_failovers)
    texts, _ = clients.ended()
    assert texts == expected
    assert httpx.get(f"{server.url}/readyz").json()["awaited"] == []
    server.stop()
