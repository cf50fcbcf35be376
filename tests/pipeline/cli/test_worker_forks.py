"""What workers are forks of, as a command: everything is imported, and nobody has asked for one."""

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from pipeline.placement import fork_server
from pipeline.placement.fork_server import start_early, started
from pipeline.placement.forked_worker import Forks

BAD_USE = ["--manifest", "none", "--supervised", "--stage-idx", "0", "--model-dir", "none"]
# As the command, but for what its forks do.
DRAW = """
import os, random
import pipeline.cli.stage_worker
from pipeline.kernels.kernel_selection import import_kernels
import_kernels()
num_threads = len(os.listdir("/proc/self/task"))
from pipeline.placement.fork_server import fork_for_requests
fork_for_requests()
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
key = X25519PrivateKey.generate().private_bytes_raw().hex()
print(num_threads, key, random.random())
"""


async def said(worker):
    """All that it says before it ends, and how it ends."""
    told = b""
    async for data in worker.stdout:
        told += data
    return told.decode(), await worker.wait()


@pytest.fixture
async def forks():
    found = Forks()
    yield found
    with trio.CancelScope(shield=True):
        await found.aclose()


async def test_forks_are_workers_each_with_its_own_arguments(forks):
    for arguments, reason in ((BAD_USE, "none"), (["--nonsense", *BAD_USE], "--nonsense")):
        worker = await forks.start(arguments)
        told, code = await said(worker)
        worker.close()
        assert told.startswith("failed ")
        assert reason in told
        assert code == 2


async def test_forks_draw_keys_of_their_own(forks, monkeypatch):
    """Attack: what two of them had drawn from one state would be known to both."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(fork_server, "COMMAND", (sys.executable, "-c", DRAW))
    drawn = []
    for _ in range(2):
        worker = await forks.start([])
        told, code = await said(worker)
        worker.close()
        assert code == 0
        drawn.append(told.split())
    (num_threads, *one), (_, *other) = drawn
    assert num_threads == "1"
    assert len(one) == len(other) == 2
    assert {*one}.isdisjoint(other)


def test_it_ends_quietly_when_nobody_asks_any_more(capfd):
    start_early()
    early = started()
    other = started()
    assert early.process.pid != other.process.pid
    for each in (early, other):
        each.requests.close()
        assert each.process.wait(300) == 0
    assert capfd.readouterr() == ("", "")


STARTS = """
import os, sys
from pipeline.placement import fork_server
fork_server.COMMAND = (sys.executable, "-c", sys.argv[1])
server = fork_server.started()
os.read(server.requests.fileno(), 1)  # it has begun
"""
# In place of imports that take so long.
IMPORTS = """
import os, time
from pipeline.cli import worker_forks
def settle_libraries():
    os.write(0, b"x")
    time.sleep(1e6)
worker_forks.settle_libraries = settle_libraries
worker_forks.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell of a parent's end")
def test_it_ends_with_its_parent_while_it_imports():
    command = [sys.executable, "-c", STARTS, IMPORTS]
    subprocess.run(command, capture_output=True, check=True, timeout=300)  # while one holds stderr


def test_a_command_that_fails_before_it_asks_leaves_none_behind():
    command = [Path(sys.executable).with_name("pipeline-orch"), "--supervise", "--nonsense"]
    found = subprocess.run(command, capture_output=True, text=True)  # until nobody holds stderr
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
