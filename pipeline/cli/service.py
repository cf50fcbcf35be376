"""A server's life before pipelines that come and go: what clients and probes hear meanwhile."""

import logging
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import trio

from pipeline.cli.replica import Replica
from pipeline.errors import ServerLeaving, SessionError
from pipeline.gateway.desk import Desk
from pipeline.gateway.errors import ApiError, from_pipeline, leaving, unavailable
from pipeline.gateway.readiness import Awaited, Phase, Readiness
from pipeline.orchestrator.remote_pipeline import Pipeline

logger = logging.getLogger(__name__)

# When clients that were refused for want of a stage may ask again.
RETRY_SECONDS = 10
# What workers say of it names files: that is for the log alone.
CANNOT_START = "its worker cannot start; the server's log says why"
# Phases of pipelines that may serve whoever asks now, the nearest to that first.
_NEAREST = (Phase.READY, Phase.RECOVERING, Phase.STARTING, Phase.AWAY)
# For the answers of those who wait when the pipeline has failed for good, or time is up.
LAST_ANSWER_SECONDS = 5.0


class Service:
    """What the fate of its pipelines means for a desk, and whoever probes them."""

    def __init__(self, desk: Desk, replicas: Sequence[Replica]) -> None:
        self._desk = desk
        self._replicas = replicas
        self._has_ended = False
        self._changed = trio.lowlevel.ParkingLot()
        for replica in replicas:
            replica.on_change = self._look

    async def fail(self, error: SessionError) -> None:
        """Nobody will be served; return when whoever waits has an answer, or had the time."""
        self._has_ended = True
        self._desk.close(lambda: from_pipeline(error))
        for replica in self._replicas:
            replica.engine.fail(error)
        await self._wait_for_last_answers()

    async def leave(self, grace_seconds: float) -> None:
        """Take no more orders; return when those under way have ended, or had the time."""
        self._has_ended = True
        self._desk.close(leaving)
        with trio.move_on_after(grace_seconds):
            await self._desk.wait_idle()
            for replica in self._replicas:
                await replica.engine.wait_saved()
        for replica in self._replicas:
            replica.engine.fail(ServerLeaving("the server is stopping"))
        await self._wait_for_last_answers()

    async def renew_when_told(self, wait_idle: Callable[[int], Awaitable[None]]) -> None:
        """`renew` at each SIGUSR1."""
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            async for _ in signals:
                await self.renew(wait_idle)

    async def renew(self, wait_idle: Callable[[int], Awaitable[None]]) -> None:
        """Replace the stages of one pipeline after the other, each while another one serves.

        `wait_idle` of a pipeline's number returns once it has no request.
        """
        if len(self._replicas) == 1:
            logger.warning(
                "event=not_renewed detail=%r", "nobody would serve meanwhile; give --replicas 2"
            )
            return
        for replica in self._replicas:
            while not any(each.is_open for each in self._replicas if each is not replica):
                await self._changed.park()
            await replica.renew(partial(wait_idle, replica.idx))

    def readiness(self) -> Readiness:
        """What probes are told now: as much as the pipeline that is nearest to it can do."""
        phases = {replica.phase for replica in self._replicas}
        # One is drained only while there is another.
        phase = Phase.LEAVING if self._has_ended else next(p for p in _NEAREST if p in phases)
        is_alone = len(self._replicas) == 1
        awaited = [
            replace(each, replica=None if is_alone else replica.idx)
            for replica in self._replicas
            if replica.pipeline is not None
            for each in _awaited(replica.pipeline)
        ]
        return Readiness(phase, tuple(awaited))

    def _look(self) -> None:
        """Take orders from the first pipeline that stands on, until there is none."""
        self._changed.unpark_all()
        if self._has_ended:
            return
        sizes = [
            replica.pipeline.vocab_size
            for replica in self._replicas
            if replica.is_open and replica.pipeline is not None
        ]
        if sizes:
            self._desk.open(min(sizes))
        elif any(replica.phase is Phase.AWAY for replica in self._replicas):
            self._desk.close(self._refusal)

    def _refusal(self) -> ApiError:
        awaited = ", ".join(
            f"stage {each.stage}"
            + ("" if each.replica is None else f" of replica {each.replica}")
            + (f" ({each.problem})" if each.problem else "")
            for each in self.readiness().awaited
        )
        return unavailable(f"The pipeline waits for {awaited or 'its stages'}.", RETRY_SECONDS)

    async def _wait_for_last_answers(self) -> None:
        with trio.move_on_after(LAST_ANSWER_SECONDS):
            await self._desk.wait_idle()


def _awaited(pipeline: Pipeline) -> Iterator[Awaited]:
    now, progress, problems = trio.current_time(), pipeline.progress, pipeline.problems
    for idx, since in sorted(pipeline.away.items()):
        loaded = progress[idx].loaded if idx in progress else None
        done, total = loaded or (None, None)
        problem = CANNOT_START if idx in problems else None
        yield Awaited(idx, round(now - since, 1), done, total, problem)
