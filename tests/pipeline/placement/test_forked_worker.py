"""Workers whose server hangs: whoever has started them ends nevertheless, and leaves nothing."""

import os
import signal
import sys
from pathlib import Path

import pytest
import trio

from pipeline.placement import fork_server, forked_worker, worker_supervisor
from pipeline.placement.forked_worker import Forks
from pipeline.placement.worker_supervisor import Supervisor

FORKS = """
import time
from pipeline.placement.fork_server import fork_for_requests
if "--stage-idx" in fork_for_requests():
    time.sleep(1e6)
"""


@pytest.fixture(autouse=True)
def _forks_that_sleep(monkeypatch):
    monkeypatch.setattr(fork_server, "COMMAND", (sys.executable, "-c", FORKS))


async def test_a_supervisor_ends_its_workers_where_nobody_tells_of_their_end(monkeypatch):
    monkeypatch.setattr(worker_supervisor, "STOP_SECONDS", 0.1)
    begun = trio.Event()
    async with trio.open_nursery() as nursery:
        supervisor = Supervisor(None, lambda _: (), nursery, begun.set)
        await supervisor.start(0)
        await begun.wait()
        worker, server = supervisor.pid(0), supervisor._forks.pid
        os.kill(server, signal.SIGSTOP)
        nursery.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    while is_running(worker):  # noqa: ASYNC110 - it is another's child by now
        await trio.sleep(0.01)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_server_that_hangs_once_all_its_workers_have_ended_is_killed(monkeypatch):
    monkeypatch.setattr(forked_worker, "LEAVE_SECONDS", 0.05)
    forks = Forks()
    worker = await forks.start([])
    assert await worker.wait() == 0
    worker.close()
    server = forks.pid
    os.kill(server, signal.SIGSTOP)
    await forks.aclose()
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
