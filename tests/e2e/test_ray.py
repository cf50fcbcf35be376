"""Stages on the nodes of a Ray cluster: workers, their keepers and whole nodes die under load."""

import importlib.util
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.ray_nodes import RayNodes
from tests.e2e.test_many_losses import pieces

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


class Clients:
    """Each asks for its text again and again."""

    def __init__(self, server, num_clients):
        self._server = server
        self._pieces = threading.Semaphore(0)
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(num_clients)
        self._runs = [self._pool.submit(self._run, index) for index in range(num_clients)]

    def wait_for(self, num_pieces):
        """Return once there are so many more, of all texts together."""
        for _ in range(num_pieces):
            assert self._pieces.acquire(timeout=300)

    def ended(self):
        """Once all have their whole text: each one's texts, and the longest that any waited."""
        self._is_over.set()
        with self._pool:
            found = [run.result(300) for run in self._runs]
        return [texts for texts, _ in found], max(silence for _, silence in found)

    def _run(self, index):
        texts, times = set(), []
        while not (texts and self._is_over.is_set()):
            text = ""
            for piece in pieces(self._server, index):
                text += piece
                times.append(time.monotonic())
                self._pieces.release()
            texts.add(text)
        return texts, max(after - before for before, after in itertools.pairwise(times))


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


def test_losses_under_load_change_no_text(serve, nodes, capsys):
    server = serve("--max-batch", str(NUM_CLIENTS))
    draw = random.Random(0)
    expected, _ = Clients(server, NUM_CLIENTS).ended()
    silences = {kind: [] for kind in KINDS}
    kinds = KINDS * NUM_LOSSES
    draw.shuffle(kinds)
    for kind in kinds:
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
        silences[kind].append(silence)
    with capsys.disabled():
        for kind, found in silences.items():
            print(f"\n{kind}: {len(found)} losses, median {statistics.median(found):.2f} s, "
                  f"longest {max(found):.2f} s", end="")  # fmt: skip
    pids = {pid for pids in placed(server).values() for pid in pids}
    server.stop()
    assert not any(map(is_running, pids))


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
