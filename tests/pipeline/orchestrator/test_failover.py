"""What the user hears when a pipeline cannot be mended."""

from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import pytest
import trio

from pipeline.errors import SessionError, SessionRefused
from pipeline.orchestrator.failover import MAX_FRUITLESS, run_with_failover


class Away:
    """A pipeline whose first attempt fails for another reason than the one that lasts."""

    waiting_for = "stage 1's control channel"
    num_results = 0
    progress = MappingProxyType({})

    def __init__(self, attempts):
        self._attempts = iter(attempts)

    async def connect(self, source):
        if failure := next(self._attempts):
            raise SessionError(failure)
        await trio.sleep_forever()


async def nothing(pipeline):
    raise AssertionError("it never stood")


async def test_giving_up_names_what_is_missing_now_not_what_failed_at_first(autojump_clock):
    with pytest.raises(SessionError, match=r"gave up after 10 s: stage 1's control channel"):
        await run_with_failover(Away(["stage 0 is lost", None]), nothing, Source(), 10.0)


async def test_giving_up_between_attempts_names_the_last_failure(autojump_clock):
    with pytest.raises(SessionError, match=r"gave up after 10 s: stage 0 is lost"):
        await run_with_failover(Away(["stage 0 is lost"] * 100), nothing, Source(), 10.0)


class Refusing(Away):
    """A pipeline of which a stage will never take part as it is asked to."""

    def __init__(self, is_joined):
        self.num_attempts = 0
        self.is_joined = is_joined

    async def connect(self, source):
        self.num_attempts += 1
        if not self.is_joined:
            raise SessionRefused("stage 0 refused the session: too large")

    @asynccontextmanager
    async def unbroken(self):
        yield


@pytest.mark.parametrize("is_joined", [False, True])
async def test_what_a_stage_refuses_is_not_asked_for_again(autojump_clock, is_joined):
    pipeline = Refusing(is_joined)

    async def work(pipeline):
        raise SessionRefused("stage 0 refused the session: too large")

    began = trio.current_time()
    with pytest.raises(SessionRefused, match="too large"):
        await run_with_failover(pipeline, work, Source(has_work=True), 30.0)
    assert pipeline.num_attempts == 1
    assert trio.current_time() == began


class Flapping:
    """A pipeline that breaks as soon as it stands, or when its time has come."""

    num_results = 0
    progress = MappingProxyType({})

    def __init__(self, seconds=0.0):
        self.connected_at = []
        self.seconds = seconds

    async def connect(self, source):
        self.connected_at.append(trio.current_time())

    @asynccontextmanager
    async def unbroken(self):
        yield

    async def work(self, pipeline):
        await trio.sleep(self.seconds)
        raise SessionError("a link broke")


@dataclass
class Source:
    has_work: bool = False
    num_given_up: int = 0


async def test_an_idle_pipeline_that_flaps_is_mended_ever_less_often(autojump_clock):
    pipeline = Flapping()
    with trio.move_on_after(60):
        await run_with_failover(pipeline, pipeline.work, Source(), 10.0)
    pauses = [b - a for a, b in pairwise(pipeline.connected_at)]
    assert pauses[:7] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert len(pauses) > 50


async def test_a_pipeline_that_stood_for_long_is_mended_at_once_each_time(autojump_clock):
    pipeline = Flapping(20.0)
    with trio.move_on_after(1000):
        await run_with_failover(pipeline, pipeline.work, Source(), 10.0)
    assert {b - a for a, b in pairwise(pipeline.connected_at)} == {20.0}


async def test_losses_without_any_result_come_to_an_end(autojump_clock):
    pipeline = Flapping()
    with pytest.raises(SessionError, match="a link broke"):
        await run_with_failover(pipeline, pipeline.work, Source(has_work=True), 10.0)
    assert len(pipeline.connected_at) == MAX_FRUITLESS + 1


async def test_giving_a_request_up_is_progress(autojump_clock):
    pipeline, source = Flapping(), Source(has_work=True)

    async def work(pipeline):
        source.num_given_up += len(pipeline.connected_at) % 4 == 0
        await Flapping.work(pipeline, pipeline)

    with trio.move_on_after(100) as scope:
        await run_with_failover(pipeline, work, source, 10.0)
    assert scope.cancelled_caught
