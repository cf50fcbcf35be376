"""A pipeline that outlives its stages: what is heard of it, and how often it is tried."""

import logging
from contextlib import asynccontextmanager
from itertools import pairwise
from types import MappingProxyType

import pytest
import trio

from pipeline.errors import SessionError, SessionRefused, StageMismatch
from pipeline.orchestrator.outage import outlast


class Source:
    has_work = False
    num_given_up = 0


class Machines:
    """A pipeline whose connections end as `outcomes` says: an error, or None for one that stands.

    One that stands works for `seconds`, and is then lost.
    """

    waiting_for = "stage 1"
    progress = MappingProxyType({})

    def __init__(self, *outcomes, seconds=100.0):
        self.num_results = 0
        self.tried_at = []
        self.heard = []
        self._outcomes = iter(outcomes)
        self._seconds = seconds

    async def connect(self, source):
        self.tried_at.append(trio.current_time())
        error = next(self._outcomes, "the end")
        if error == "the end":
            raise KeyboardInterrupt
        if error is not None:
            raise error

    @asynccontextmanager
    async def unbroken(self):
        yield

    async def work(self, pipeline):
        self.heard.append("work")
        self.num_results += 1
        await trio.sleep(self._seconds)
        raise SessionError("stage 1 is lost")

    async def outlast(self):
        await outlast(self, self.work, Source(), 10.0, lambda error: self.heard.append(str(error)))


async def run(machines):
    with pytest.raises(KeyboardInterrupt):
        await machines.outlast()
    return machines


async def test_a_stage_that_never_came_is_awaited_and_then_served(autojump_clock):
    away = [SessionError("stage 1 is down")] * 30
    machines = await run(Machines(*away, None))
    assert machines.heard[0] == "gave up after 10 s: stage 1 is down"
    assert machines.heard[-1] == "work"
    assert machines.heard.count("work") == 1


async def test_a_stage_away_for_long_is_tried_often_enough_to_be_met_within_ten_seconds(
    autojump_clock,
):
    away = [SessionError("stage 1 is down")] * 200
    machines = await run(Machines(None, *away, None))
    assert machines.heard[0] == machines.heard[-1] == "work"
    assert max(b - a for a, b in pairwise(machines.tried_at[2:-1])) <= 10
    assert machines.tried_at[-1] - machines.tried_at[1] > 90


@pytest.mark.parametrize("kind", [SessionRefused, StageMismatch])
async def test_what_is_set_up_wrongly_ends_it_before_it_has_ever_stood(autojump_clock, kind):
    machines = Machines(*[kind("stage 0 has another manifest")] * 100)
    with pytest.raises(kind, match="another manifest"):
        await machines.outlast()
    assert machines.heard == []


@pytest.mark.parametrize("kind", [SessionRefused, StageMismatch])
async def test_what_is_set_up_wrongly_later_is_awaited(autojump_clock, kind):
    wrong = [kind("stage 0 has another manifest")] * 25
    machines = await run(Machines(None, *wrong, None))
    assert (machines.heard[0], machines.heard[-1]) == ("work", "work")
    assert "another manifest" in machines.heard[1]


async def test_a_stage_away_is_said_once_a_minute_and_that_it_is_back_once(autojump_clock, caplog):
    away = [SessionError("stage 1 is down")] * 200
    with caplog.at_level(logging.WARNING, "pipeline.orchestrator.outage"):
        await run(Machines(None, *away, None))
    outages = [each for each in caplog.records if each.name == "pipeline.orchestrator.outage"]
    lines = [each.getMessage() for each in outages]
    told = [line for line in lines if line.startswith("event=pipeline_away")]
    (back,) = [line for line in lines if line not in told]
    what, _, seconds = back.rpartition("=")
    assert what == "event=pipeline_back after_seconds"
    assert len(told) == pytest.approx(float(seconds) / 60, abs=1)
    assert len(told) > 2


async def test_why_a_stage_cannot_take_part_is_said_once_of_an_outage(autojump_clock, caplog):
    wrong = [StageMismatch("stage 1 has another manifest")] * 200
    with caplog.at_level(logging.WARNING, "pipeline.orchestrator.failover"):
        await run(Machines(None, *wrong, None))
    lines = [each.getMessage() for each in caplog.records]
    # Once while it is mended at once, and once for all of the outage after that.
    assert sum(line.startswith("event=connecting_failed") for line in lines) == 2


async def test_a_refusal_is_said_at_once_and_not_again_before_the_next_minute(
    autojump_clock, caplog
):
    refused = [SessionRefused("stage 1 has no room")] * 3
    with caplog.at_level(logging.WARNING, "pipeline.orchestrator.outage"):
        await run(Machines(None, *[SessionError("stage 1 is down")] * 10, *refused, None))
    lines = [each.getMessage() for each in caplog.records]
    assert sum("no room" in line for line in lines) == 1
