"""Stages on the nodes of a Ray cluster: workers, their keepers and whole nodes die under load."""

import importlib.util
import json
import os
import random
import re
import signal
import statistics
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.lasting_clients import Clients
from tests.e2e.ray_nodes import RayNodes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

NUM_CLIENTS = 8
KINDS = ["worker", "keeper", "raylet", "node"]
NUM_LOSSES = 5  # of each kind
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
    """None once it has ended itself."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(parent)


def is_running(pid):
    return parent_of(pid) is not None


def descendants(pid):
    """Of a process, with itself."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def settled(server, raylets):
    """Of each stage its worker, keeper and raylet, all of which run, once they serve."""

    def found():
        stages = {idx: (*pids, parent_of(pids[1])) for idx, pids in placed(server).items()}
        is_whole = all(
            is_running(worker) and raylet in raylets for worker, _, raylet in stages.values()
        )
        return stages if is_whole and server.is_ready() else None

    return server.wait_for(found)


def has_moved(server, stage, worker, keeper):
    """A worker may outlive its raylet, and serve on beside its successor."""
    return placed(server)[stage] != (worker, keeper) and not is_running(worker)


def victims(kind, worker, keeper, raylet):
    """A node is lost with all that runs on it."""
    return {"worker": [worker], "keeper": [keeper], "raylet": [raylet],
            "node": descendants(raylet)}[kind]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_losses_under_load_change_no_text(serve, nodes, capsys, kind):
    server = serve("--max-batch", str(NUM_CLIENTS))
    draw = random.Random(kind)
    expected, _ = Clients(server, NUM_CLIENTS).ended()
    silences = []
    for _ in range(NUM_LOSSES):
        before = settled(server, nodes.have(3))
        stage = draw.choice(sorted(before))
        clients = Clients(server, NUM_CLIENTS)
        clients.wait_for(draw.randrange(5, 150) * NUM_CLIENTS)
        for pid in victims(kind, *before[stage]):
            with suppress(ProcessLookupError):  # it has followed another
                os.kill(pid, signal.SIGKILL)
        server.wait_for(lambda: has_moved(server, stage, *before[stage][:2]))  # noqa: B023 - now
        texts, silence = clients.ended()
        assert texts == expected
        silences.append(silence)
    with capsys.disabled():
        print(f"\n{kind}: {len(silences)} losses, median {statistics.median(silences):.2f} s, "
              f"longest {max(silences):.2f} s", end="")  # fmt: skip
    pids = {pid for pids in placed(server).values() for pid in pids}
    server.stop()
    assert not any(map(is_running, pids))


def test_texts_go_on_without_the_head(serve, nodes):
    server = serve("--max-batch", str(NUM_CLIENTS))
    expected, _ = Clients(server, NUM_CLIENTS).ended()
    clients = Clients(server, NUM_CLIENTS)
    clients.wait_for(10 * NUM_CLIENTS)
    os.kill(nodes.head["gcs"], signal.SIGKILL)
    server.wait_for(lambda: re.search("event=(cluster_away|placing_failed)", server.log()))
    texts, _ = clients.ended()
    assert texts == expected
    assert server.log().count("event=placing_failed") <= 2
    assert "Traceback" not in server.log()
    server.stop()


def test_pipelines_on_a_cluster_are_renewed_while_clients_go_on(serve):
    server = serve("--replicas", "2", "--max-batch", "4", "--threads", "1")

    def are_ready():
        return [each["state"] for each in server.pipeline()["replicas"]] == ["ready"] * 2

    server.wait_for(are_ready)
    expected, _ = Clients(server, NUM_CLIENTS).ended()
    assert all(each["num_tokens"] for each in server.pipeline()["replicas"])
    clients = Clients(server, NUM_CLIENTS)
    clients.wait_for(10 * NUM_CLIENTS)
    server.process.send_signal(signal.SIGUSR1)
    server.wait_for(lambda: server.log().count("event=replica_renewed") == 2)
    assert server.wait_for(are_ready)
    texts, _ = clients.ended()
    assert texts == expected
    server.stop()


def told(words, cluster, nodes, *flags, **environment):
    """The line with these words that a server says, and how it ends if nobody ends it."""
    command = [cluster.bin / "pipeline-orch", "serve", "--manifest", cluster.manifest,
               "--model-dir", cluster.model_dir, "--dev", "--port", "0", "--place", "ray",
               "--ray-address", nodes.address, *flags]  # fmt: skip
    with subprocess.Popen(
        command, env={**nodes.environment, **environment}, stderr=subprocess.PIPE, text=True
    ) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if words in line:
                break
        else:
            raise AssertionError(lines)
        assert "Traceback" not in "".join(lines)
        if "pipeline-orch: error:" in line:
            return process.wait()
        process.terminate()
        return None


def test_what_cannot_be_had_is_said_in_one_line(cluster, nodes):
    cluster.plan(2)
    words = f"Ray at {nodes.address}: Failed to connect to Ray cluster at {nodes.address}: nothing"
    assert told(words, cluster, nodes, RAY_AUTH_TOKEN="w" * 40) == 2
    words = "a stage takes CPU 64 of one node, and the 4 nodes have CPU 2 at most"
    assert told(words, cluster, nodes, "--ray-cpus", "64") is None
    assert told("nitro 0 at most", cluster, nodes, "--ray-resource", "nitro=1") is None
    words = "a stage takes CPU 1, memory 1e+05 GiB of one node, and the 4 nodes have memory"
    assert told(words, cluster, nodes, "--ray-memory", "100000") is None
    # One pipeline has its place, and what is left is too little for another.
    words = "2 stages take CPU 4, and the nodes have CPU 2 left"
    assert told(words, cluster, nodes, "--ray-cpus", "2", "--replicas", "2") is None
    assert told("elsewhere", cluster, nodes, "--model-dir", cluster.directory / "elsewhere") == 2
    assert told("127.0.0.1:1: ", cluster, nodes, "--ray-address", "127.0.0.1:1") is None


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
        assert placing.wait(300) == 0
