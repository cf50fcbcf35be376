"""What keeps a worker on a node."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.agreement.manifest import load_manifest
from pipeline.placement import fork_server
from pipeline.placement.ray import keeper as keeper_module
from pipeline.placement.ray.keeper import StageKeeper
from tests.pipeline.placement.conftest import ROOT, WORKER, manifest_at

TOLD = f"""
import json, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline.placement.fork_server import fork_for_requests
sys.argv[1:] = fork_for_requests()
given = dict(zip(sys.argv, sys.argv[1:]))
pathlib.Path(given["--told"]).write_text(json.dumps([sys.argv, open(given["--manifest"]).read()]))
sys.stdin.read()
"""


@pytest.fixture
def keep(monkeypatch, tmp_path):
    keepers = []

    def keep(command, *arguments):
        monkeypatch.setattr(fork_server, "COMMAND", command)
        core = json.dumps(manifest_at(tmp_path).core())
        keepers.append(StageKeeper(1, core, arguments, "127.0.0.1"))
        return keepers[-1]

    yield keep
    for keeper in keepers:
        keeper.stop()


def until(keeper, condition):
    """What the keeper reports when that holds."""
    end, seen = time.monotonic() + 60, -1
    while time.monotonic() < end:
        seen, text = keeper.report(seen)
        if condition(kept := json.loads(text)):
            return kept
    raise AssertionError(text)


def test_its_worker_reads_the_manifest_from_memory_and_listens_where_there_is_room(keep, tmp_path):
    told = tmp_path / "told"
    keep((sys.executable, "-S", "-c", TOLD), "--told", str(told))
    end = time.monotonic() + 60
    while not (told.exists() and told.read_text()) and time.monotonic() < end:
        time.sleep(0.01)
    words, core = json.loads(told.read_text())
    path = tmp_path / "read.json"
    path.write_text(core)
    manifest = load_manifest(path)
    assert all(stage.endpoint is None for stage in manifest.stages)
    given = dict(itertools.pairwise(words))
    assert given["--core"] == manifest.core_hash().hex()
    assert given["--stage-idx"] == "1"
    assert given["--control-listen"] == given["--data-in-listen"] == "tcp:127.0.0.1:0"


def test_it_tells_where_its_worker_listens_and_of_its_successor(keep):
    keeper = keep(WORKER)
    first = until(keeper, lambda kept: kept["control"])
    assert first["control"] != first["data_in"]
    assert first["loaded"] == [1, 2]
    os.kill(first["pid"], 9)
    second = until(keeper, lambda kept: kept["control"] and kept["pid"] != first["pid"])
    assert second["keeper_pid"] == first["keeper_pid"]


def test_a_worker_that_cannot_use_what_it_finds_is_tried_again_later(keep, monkeypatch):
    monkeypatch.setattr(keeper_module, "UNUSABLE_SECONDS", 0.1)
    keeper = keep(WORKER, "--refuse", "x")
    kept = until(keeper, lambda kept: kept["is_unusable"])
    assert kept["problem"] == "the worker of stage 1 cannot start: no weights here"
    assert kept["pid"] is None
    keeper._arguments = ()
    assert not until(keeper, lambda kept: kept["control"])["is_unusable"]


def test_stopped_it_leaves_no_process(keep):
    keeper = keep(WORKER)
    pid = until(keeper, lambda kept: kept["control"])["pid"]
    keeper.stop()
    assert not Path(f"/proc/{pid}").exists()
    keeper.stop()  # once more is nothing
    keeper.lose("hung")


ORPHAN = """
import os, subprocess, threading
from pipeline.placement.ray import keeper
keeper.LINGER_SECONDS = 0
parent = subprocess.Popen(["sleep", "600"])
keeper.end_with(os.pidfd_open(parent.pid), lambda: print("stopped", flush=True))
print(parent.pid, flush=True)
threading.Event().wait()
"""


def test_a_keeper_ends_its_worker_and_itself_after_the_process_that_started_it():
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as it:
        os.kill(int(it.stdout.readline()), signal.SIGKILL)
        assert it.stdout.read() == "stopped\n"
    assert it.returncode == 1
