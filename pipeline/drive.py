"""The decode loop: scheduler on one side, a pipeline on the other, one task, no handovers."""

from collections.abc import Callable, Sequence
from typing import Protocol

from pipeline.engine.request import TokenEvent
from pipeline.engine.scheduler import Scheduler, Step
from pipeline.messages import StageTiming, StepHeader

OnToken = Callable[[TokenEvent, tuple[StageTiming, ...]], None]


class StepRunner(Protocol):
    """What runs steps: the connected `Pipeline`, or a `LocalPipeline`."""

    async def send(self, step: Step) -> None:
        """Start a step."""
        ...

    async def receive(self) -> tuple[StepHeader, Sequence[int]]:
        """The result of the oldest step started."""
        ...


async def drive(pipeline: StepRunner, scheduler: Scheduler, on_token: OnToken) -> None:
    """Run until the scheduler has nothing left; every token is reported as it arrives."""
    while scheduler.has_work:
        while (step := scheduler.next_step()) is not None:
            await pipeline.send(step)
        header, token_ids = await pipeline.receive()
        for event in scheduler.complete(header, token_ids):
            on_token(event, header.timings)
