"""A server's life before a pipeline that comes and goes: what clients and probes hear meanwhile."""

from collections.abc import Iterator, Sequence

import trio

from pipeline.engine.engine import PipelineEngine
from pipeline.errors import ServerLeaving, SessionError
from pipeline.gateway.desk import Desk
from pipeline.gateway.errors import ApiError, from_pipeline, leaving, unavailable
from pipeline.gateway.readiness import Awaited, Phase, Readiness
from pipeline.orchestrator.remote_pipeline import Pipeline
from pipeline.orchestrator.stage_watch import RemoteStage

# When clients that were refused for want of a stage may ask again.
RETRY_SECONDS = 10
# What workers say of it names files: that is for the log alone.
CANNOT_START = "its worker cannot start; the server's log says why"
# For the answers of those who wait when the pipeline has failed for good, or time is up.
LAST_ANSWER_SECONDS = 5.0


class Service:
    """What a pipeline's fate means for a desk, its engine and whoever probes them."""

    def __init__(self, desk: Desk, engine: PipelineEngine) -> None:
        self._desk = desk
        self._engine = engine
        self._pipeline: Pipeline | None = None
        self._phase = Phase.STARTING

    def made(self, pipeline: Pipeline) -> None:
        """Hear of the pipeline before it is connected."""
        self._pipeline = pipeline

    def open(self, pipeline: Pipeline) -> None:
        """It stands, for the first time or again: take orders."""
        if self._phase is not Phase.LEAVING:
            self._phase = Phase.READY
            self._desk.open(pipeline.vocab_size)

    def away(self, error: SessionError) -> None:
        """It could not be mended in time: whoever waits is told so, and whoever comes."""
        if self._phase is not Phase.LEAVING:
            self._phase = Phase.AWAY
            self._desk.close(self._refusal)
        self._engine.drop_all(error)

    async def fail(self, error: SessionError) -> None:
        """It never will; return when whoever waits for an answer has one, or had the time."""
        self._engine.fail(error)
        self._desk.close(lambda: from_pipeline(error))
        await self._wait_for_last_answers()

    async def leave(self, grace_seconds: float) -> None:
        """Take no more orders; return when those under way have ended, or had the time."""
        self._phase = Phase.LEAVING
        self._desk.close(leaving)
        with trio.move_on_after(grace_seconds):
            await self._desk.wait_idle()
            await self._engine.wait_saved()
        self._engine.fail(ServerLeaving("the server is stopping"))
        await self._wait_for_last_answers()

    def stages(self) -> Sequence[RemoteStage]:
        """Those that are there."""
        return () if self._pipeline is None else self._pipeline.stages

    def readiness(self) -> Readiness:
        """What probes are told now."""
        pipeline, phase = self._pipeline, self._phase
        if pipeline is None:
            return Readiness(phase)
        if phase is Phase.READY and not pipeline.is_joined:
            phase = Phase.RECOVERING
        return Readiness(phase, tuple(_awaited(pipeline)))

    def _refusal(self) -> ApiError:
        awaited = ", ".join(
            f"stage {each.stage}" + (f" ({each.problem})" if each.problem else "")
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
