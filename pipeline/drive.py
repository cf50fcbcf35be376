"""The decode loop: scheduler on one side, a pipeline on the other, one task, no handovers."""

from collections.abc import Callable
from typing import Protocol

from pipeline.engine.request import TokenEvent
from pipeline.engine.scheduler import Scheduler, Step
from pipeline.messages import StageTiming
from pipeline.steps import StepResult

OnToken = Callable[[TokenEvent, tuple[StageTiming, ...]], None]


class StepRunner(Protocol):
    """What runs steps: the connected `Pipeline`, or a `LocalPipeline`."""

    async def send(self, step: Step) -> None:
        """Start a step."""
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
    while scheduler.has_work:
        while (step := scheduler.next_step()) is not None:
            await pipeline.send(step)
        for event in events:
            on_token(event, timings)
        result = await pipeline.receive()
        events = scheduler.complete(result.header, result.token_ids)
        timings = result.header.timings
    for event in events:
        on_token(event, timings)
