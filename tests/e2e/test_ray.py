"""Stages on the nodes of a Ray cluster: workers, their keepers and whole nodes die under load."""

import importlib.util
import json
import os
import random
import re
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.ray_nodes import RayNodes
from tests.e2e.test_many_losses import Streams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

NUM_CLIENTS = 8
NUM_LOSSES = 4  # of each kind
PLACED = re.compile(r"event=stage_placed stage=(\d) node=\S+ pid=(\d+) keeper_pid=(\d+)")


@pytest.fixture
def nodes(tmp_path):
    nodes = RayNodes(tmp_path, 3)
    yield nodes
    nodes.stop()


@pytest.fixture
def serve(cluster, nodes):
    cluster.plan(2)
    cluster.environment = {**nodes.environment, **{
        name: value for name, value in cluster.environment.items() if name.startswith("VEILPIPE")
    }}  # fmt: skip

    def serve(*extra):
        flags = ("--place", "ray", "--ray-address", nodes.address, "--context", "512", *extra)
        return cluster.serve(*flags)

    return serve


def placed(server):
    """Of each stage its worker and its keeper now."""
    return {int(idx): (int(pid), int(keeper)) for idx, pid, keeper in PLACED.findall(server.log())}


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def victim(kind, pids):
    worker, keeper = pids
    return {"worker": worker, "keeper": keeper, "node": parent_of(keeper)}[kind]


@pytest.mark.parametrize("kind", ["worker", "keeper", "node"])
def test_losses_under_load_change_no_text(serve, nodes, kind, capsys):
    server = serve("--max-batch", str(NUM_CLIENTS))
    draw = random.Random(kind)
    expected, _ = Streams(server, NUM_CLIENTS).ended_after(lambda: None)
    silences = []
    for count in range(NUM_LOSSES):
        before = placed(server)
        stage = count % 2

        def lose(stage=stage, before=before):
            time.sleep(draw.uniform(0, 0.5))
            os.kill(victim(kind, before[stage]), signal.SIGKILL)

        texts, silence = Streams(server, NUM_CLIENTS).ended_after(lose)
        assert texts == expected
        silences.append(silence)
        server.wait_for(lambda: placed(server)[stage] != before[stage])  # noqa: B023 - now
        server.wait_for(server.is_ready)
        nodes.have(3)
    with capsys.disabled():
        print(f"\n{kind}: {NUM_LOSSES} losses, median {statistics.median(silences):.2f} s, "
              f"longest {max(silences):.2f} s")  # fmt: skip
    pids = {pid for pids in placed(server).values() for pid in pids}
    server.stop()
    assert not any(map(is_running, pids))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def refused(cluster, nodes, *flags, **environment):
    """How a server ends whose cluster cannot be had: its one line."""
    cluster.environment = {**nodes.environment, **environment}
    words = ["serve", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--dev"]
    place = ["--place", "ray", "--ray-address", nodes.address, "--connect-timeout", "5"]
    found = cluster.orch_command(*words, "--port", "0", *place, "--exit-on-loss", *flags)
    assert found.returncode != 0
    (line,) = [line for line in found.stderr.splitlines() if "error:" in line and "orch" in line]
    return line


def test_what_cannot_be_had_is_said_in_one_line(cluster, nodes):
    cluster.plan(2)
    line = refused(cluster, nodes, RAY_AUTH_TOKEN="w" * 40)
    assert "oken" in line
    line = refused(cluster, nodes, "--ray-address", "127.0.0.1:1")
    assert "127.0.0.1:1" in line
    line = refused(cluster, nodes, "--ray-cpus", "64")
    assert "takes CPU 64 of one node, and the 4 nodes have CPU 2 at most" in line
    line = refused(cluster, nodes, "--ray-resource", "nitro=1")
    assert "nitro 0 at most" in line
    line = refused(cluster, nodes, "--model-dir", cluster.directory / "elsewhere")
    assert "elsewhere" in line


def test_stages_that_are_placed_serve_whoever_reads_where_they_are(cluster, nodes):
    cluster.plan(2)
    cluster.environment = {**nodes.environment, **cluster.environment}
    path = cluster.directory / "placed.json"
    command = [cluster.bin / "pipeline-orch", "place", "ray", "--manifest", cluster.manifest,
               "--model-dir", cluster.model_dir, "--dev", "--output", path,
               "--ray-address", nodes.address]  # fmt: skip
    with subprocess.Popen(command, env=cluster.environment, stderr=subprocess.PIPE, text=True) as (
        placing
    ):
        lines = []
        for line in placing.stderr:
            lines.append(line)
            if "all stages are placed" in line:
                break
        cluster.manifest = path
        first = cluster.orch("Hello", "--max-tokens", "5")
        assert first.returncode == 0, first.stderr
        addresses = json.loads(path.read_text())["stages"][1]["endpoint"]
        worker = int(PLACED.findall("".join(lines))[-1][1])
        os.kill(worker, signal.SIGKILL)
        for line in placing.stderr:
            if "event=stage_placed" in line:
                break
        assert json.loads(path.read_text())["stages"] != addresses
        assert cluster.orch("Hello", "--max-tokens", "5").stdout == first.stdout
        placing.terminate()
        assert placing.wait(60) == 0
