"""Stages behind the relay of a parent instance, as real processes."""

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

RELAY = Path(sys.executable).parent / "pipeline-relay"
TEXT = ("Hello there", "--max-tokens", "5", "--ignore-eos")


@contextmanager
def relaying(cluster, *maps):
    """The relay's process, once it has named its maps."""
    arguments = [word for mapping in maps for word in ("--map", mapping)]
    command = [RELAY, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in maps:
                assert process.stderr.readline().startswith("relaying ")
            yield process
        finally:
            process.terminate()


@pytest.fixture
def relayed(cluster):
    """The maps to the stage, which `cluster.listen` tells to listen behind them."""
    cluster.plan(1)
    base = cluster.base_port
    cluster.listen = [
        *("--control-listen", f"127.0.0.1:{base + 2}"),
        *("--data-in-listen", f"127.0.0.1:{base + 3}"),
    ]
    return [f"127.0.0.1:{base + i}=127.0.0.1:{base + i + 2}" for i in range(2)]


def test_a_stage_that_comes_up_behind_its_relay_is_waited_for(cluster, relayed):
    with relaying(cluster, *relayed):
        orchestrator = cluster.start_orch(*TEXT)
        time.sleep(3)  # the relay answers for a stage that is not there
        assert orchestrator.poll() is None
        cluster.start_worker(0, *cluster.listen)
        stdout, stderr = orchestrator.communicate(timeout=300)
    assert orchestrator.returncode == 0, stderr
    assert stdout.startswith(b"Hello there")
    assert stderr.count(b"waiting for stage 0's control channel") == 1


def test_a_stage_that_never_comes_up_behind_its_relay_is_named(cluster, relayed):
    with relaying(cluster, *relayed):
        done = cluster.orch(*TEXT, "--connect-timeout", "3")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "gave up after 3 s: stage 0's control channel" in line
    assert "not up" in line
