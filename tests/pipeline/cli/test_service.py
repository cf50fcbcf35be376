"""What probes and clients are told of stages that are not there."""

from types import SimpleNamespace

import pytest
import trio

from pipeline.cli.replica import Replica
from pipeline.cli.service import Service
from pipeline.errors import SessionError
from pipeline.gateway.readiness import Awaited, Phase
from pipeline.placement.base import Progress
from pipeline.worker_report import Loaded


class Desk:
    """What it was last told."""

    refusal = None
    vocab_size = None

    def open(self, vocab_size):
        self.refusal, self.vocab_size = None, vocab_size

    def close(self, refusal):
        self.refusal = refusal


@pytest.fixture
def desk():
    return Desk()


class Engine:
    failure = dropped = None

    def drop_all(self, error):
        self.dropped = error

    def fail(self, error):
        self.failure = error


@pytest.fixture
def replicas():
    return [Replica(idx, Engine()) for idx in range(3)]


@pytest.fixture
def service(desk, replicas):
    return Service(desk, replicas[:1])


def pipeline(**changes):
    now = trio.current_time()
    given = {"away": {1: now - 2.0, 0: now - 7.0}, "is_joined": False, "progress": {}}
    return SimpleNamespace(**given | {"problems": {}, "vocab_size": 300} | changes)


def joined():
    return pipeline(away={}, is_joined=True)


async def test_what_each_stage_has_read_is_told_where_it_is_known(
    service, replicas, autojump_clock
):
    progress = {0: Progress(77, 1.0), 1: Progress(78, 1.0, Loaded(10, 40))}
    replicas[0].made(pipeline(progress=progress))
    readiness = service.readiness()
    assert readiness.phase is Phase.STARTING
    assert readiness.awaited == (Awaited(0, 7.0), Awaited(1, 2.0, 10, 40))


async def test_a_worker_that_cannot_start_is_named_and_nothing_of_its_files(
    service, replicas, desk, autojump_clock
):
    problems = {1: "/secret/model.safetensors: not what the manifest says"}
    replicas[0].made(pipeline(problems=problems))
    replicas[0].away(SessionError("gave up"))
    (_, awaited) = service.readiness().awaited
    message = desk.refusal().message
    assert awaited.problem in message
    assert "stage 1 (its worker cannot start" in message
    assert "secret" not in message + awaited.problem


async def test_orders_are_taken_as_long_as_one_of_several_pipelines_stands(
    desk, replicas, autojump_clock
):
    service = Service(desk, replicas)
    assert service.readiness().phase is Phase.STARTING
    for replica in replicas[:2]:
        replica.made(joined())
        replica.open()
        assert (desk.refusal, desk.vocab_size) == (None, 300)
    replicas[0].away(SessionError("gave up"))
    assert replicas[0].engine.dropped is not None
    assert replicas[1].engine.dropped is None
    assert desk.refusal is None
    assert service.readiness().is_ready
    replicas[1].made(pipeline())  # being mended
    assert service.readiness().phase is Phase.RECOVERING
    replicas[1].away(SessionError("gave up"))
    assert "stage 0 of replica 1" in desk.refusal().message
    assert {each.replica for each in service.readiness().awaited} == {1}
    replicas[2].made(joined())
    replicas[2].open()
    assert desk.refusal is None


async def test_pipelines_are_renewed_one_after_the_other_each_while_another_serves(
    desk, replicas, autojump_clock
):
    service = Service(desk, replicas)
    for replica in replicas:
        replica.made(joined())
        replica.open()
    replicas[1].away(SessionError("gave up"))
    replicas[2].away(SessionError("gave up"))
    drained = []

    async def wait_idle(idx):
        assert any(each.is_open for each in replicas)
        drained.append(idx)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.renew, wait_idle)
        await trio.sleep(1000)
        assert not drained  # nobody would serve meanwhile
        replicas[2].open()
        for idx in range(3):
            await trio.sleep(1)
            assert drained == list(range(idx + 1))
            assert replicas[idx].phase is Phase.STARTING
            replicas[idx].made(joined())
            replicas[idx].open()


async def test_a_pipeline_that_is_alone_is_not_taken_away(service, replicas, caplog):
    await service.renew(None)
    assert replicas[0].phase is Phase.STARTING
    assert "give --replicas 2" in caplog.text


async def test_a_server_that_leaves_opens_no_more(desk, replicas, autojump_clock):
    service = Service(desk, replicas)
    desk.wait_idle = trio.lowlevel.checkpoint
    await service.fail(SessionError("x"))
    assert all(replica.engine.failure is not None for replica in replicas)
    replicas[0].made(joined())
    replicas[0].open()
    assert desk.refusal is not None
    assert service.readiness().phase is Phase.LEAVING
