"""One pipeline of several: it is renewed without a request, and what cannot replace it waits."""

from types import SimpleNamespace

import pytest
import trio
import trio.testing

from pipeline.cli.replica import Replica, run_all
from pipeline.errors import InputError, SessionError
from pipeline.gateway.readiness import Phase

STANDS = SimpleNamespace(is_joined=True, stages=["a stage"])


class Access:
    """Connects at once, unless it is to fail; counts its lives, and those that have ended."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.num_begun = self.num_ended = 0

    async def run(self, work, source, watcher, *, outlasts):
        assert source == "scheduler"
        assert outlasts
        self.num_begun += 1
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        watcher.made(STANDS)
        try:
            await work(STANDS)
        finally:
            self.num_ended += 1


class Engine:
    scheduler = "scheduler"
    dropped = None

    def drop_all(self, error):
        self.dropped = error


def new_replica(idx=0):
    return Replica(idx, Engine())


async def stand(replica, pipeline):
    assert pipeline is STANDS
    replica.open()
    await trio.sleep_forever()


async def test_it_takes_requests_only_while_it_stands_and_is_not_drained(autojump_clock):
    replica, access, idle = new_replica(), Access(), trio.Event()
    assert not replica.takes_requests
    assert list(replica.stages) == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_all([replica], [access], stand, outlasts=True))
        await trio.testing.wait_all_tasks_blocked()
        assert replica.takes_requests
        assert list(replica.stages) == ["a stage"]
        nursery.start_soon(replica.renew, idle.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert replica.phase is Phase.DRAINING
        assert not replica.takes_requests
        assert access.num_ended == 0
        idle.set()
        await trio.testing.wait_all_tasks_blocked()
        assert (access.num_begun, access.num_ended) == (2, 1)
        assert replica.takes_requests
        nursery.cancel_scope.cancel()


async def test_what_cannot_take_its_place_is_tried_again_and_ends_nothing(autojump_clock, caplog):
    replica = new_replica()
    access = Access(None, InputError("no weights"), SessionError("refused"), None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_all([replica], [access], stand, outlasts=True))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(replica.renew, trio.lowlevel.checkpoint)
        await trio.sleep(1)
        assert replica.phase is Phase.AWAY
        assert "event=replica_not_renewed replica=0 error=no weights" in caplog.text
        await trio.sleep(60)
        assert access.num_begun == 4
        assert replica.takes_requests
        nursery.cancel_scope.cancel()


async def test_what_has_never_stood_at_first_ends_the_server():
    replicas = [new_replica(idx) for idx in range(2)]
    accesses = [Access(), Access(InputError("no weights"))]
    with pytest.raises(InputError, match="no weights"):
        await run_all(replicas, accesses, stand, outlasts=True)


async def test_new_stages_that_are_lost_once_they_have_stood_are_a_loss_as_any(autojump_clock):
    replica, access, lost = new_replica(), Access(), trio.Event()

    async def work(replica, pipeline):
        replica.open()
        await lost.wait()
        raise SessionError("lost")

    async def run():
        with pytest.raises(SessionError, match="lost"):
            await run_all([replica], [access], work, outlasts=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        await replica.renew(trio.lowlevel.checkpoint)
        assert access.num_begun == 2
        lost.set()
