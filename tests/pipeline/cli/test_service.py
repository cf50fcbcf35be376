"""What probes and clients are told of stages that are not there."""

from types import SimpleNamespace

import pytest
import trio

from pipeline.cli.service import Service
from pipeline.errors import SessionError
from pipeline.gateway.readiness import Awaited, Phase
from pipeline.placement.base import Progress
from pipeline.worker_report import Loaded


class Desk:
    def close(self, refusal):
        self.refusal = refusal


@pytest.fixture
def desk():
    return Desk()


@pytest.fixture
def service(desk):
    return Service(desk, SimpleNamespace(drop_all=lambda error: None))


def pipeline(**changes):
    now = trio.current_time()
    given = {"away": {1: now - 2.0, 0: now - 7.0}, "is_joined": False, "progress": {}}
    return SimpleNamespace(**given | {"problems": {}} | changes)


async def test_what_each_stage_has_read_is_told_where_it_is_known(service, autojump_clock):
    progress = {0: Progress(77, 1.0), 1: Progress(78, 1.0, Loaded(10, 40))}
    service.made(pipeline(progress=progress))
    readiness = service.readiness()
    assert readiness.phase is Phase.STARTING
    assert readiness.awaited == (Awaited(0, 7.0), Awaited(1, 2.0, 10, 40))


async def test_a_worker_that_cannot_start_is_named_and_nothing_of_its_files(
    service, desk, autojump_clock
):
    service.made(pipeline(problems={1: "/secret/model.safetensors: not what the manifest says"}))
    service.away(SessionError("gave up"))
    (_, awaited) = service.readiness().awaited
    message = desk.refusal().message
    assert awaited.problem in message
    assert "stage 1 (its worker cannot start" in message
    assert "secret" not in message + awaited.problem
