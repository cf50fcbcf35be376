"""The decode loop: scheduler on one side, a pipeline on the other, one task, no handovers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pipeline.engine.request import TokenEvent
from pipeline.engine.scheduler import FollowUp, Scheduler, Step
from pipeline.errors import RequestFailed
from pipeline.protocol.messages import StageTiming
from pipeline.protocol.results import StepResult
from pipeline.protocol.wants import NO_TOKEN
from pipeline.sampling.draw import NO_NUMBERS

OnToken = Callable[[TokenEvent, tuple[StageTiming, ...]], None]


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """What it has taken to keep stages together: their loss is survived where the steps are run."""

    num_handshakes: int = 0
    num_failovers: int = 0
    # From noticing the last loss to the next result, or to stages that wait for one.
    recovery_seconds: float = 0.0


class StepRunner(Protocol):
    """What runs steps: the connected `Pipeline`, or a `LocalPipeline`."""

    @property
    def stats(self) -> RunnerStats:
        """Counters so far."""
        ...

    async def send(self, step: Step) -> None:
        """Start a step."""
        ...

    def prepare(self, follow_up: FollowUp | None) -> None:
        """What may be sent the moment the next result comes; `send` is still called for it."""
        ...

    async def receive(self) -> StepResult:
        """The result of the oldest step started."""
        ...


async def drive(pipeline: StepRunner, scheduler: Scheduler, on_token: OnToken) -> None:
    """Run until the scheduler has nothing left.

    A step's tokens are reported after the next step has been sent: turning ids into text takes
    its time, and the stages need not wait for it.
    """
    events: list[TokenEvent] = []
    timings: tuple[StageTiming, ...] = ()
    try:
        while scheduler.has_work:
            while (step := scheduler.next_step()) is not None:
                await pipeline.send(step)
            while events:
                on_token(events.pop(0), timings)
            pipeline.prepare(scheduler.follow_up())
            result = await pipeline.receive()
            if NO_TOKEN in result.token_ids:
                raise RequestFailed(NO_NUMBERS)
            events = scheduler.complete(result.header, result.token_ids)
            timings = result.header.timings
    finally:  # the pipeline may fail with a step's tokens in hand: they count
        for event in events:
            on_token(event, timings)
