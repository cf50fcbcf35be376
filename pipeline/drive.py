"""The decode loop: scheduler on one side, a pipeline on the other, one task, no handovers."""

from collections.abc import Callable, Sequence
from typing import Protocol

from pipeline.engine.request import TokenEvent
from pipeline.engine.scheduler import Scheduler, Step
from pipeline.messages import StageTiming, StepHeader
from pipeline.stage import StageCore
from pipeline.tensors import token_ids_from_wire, token_ids_to_wire

OnToken = Callable[[TokenEvent, tuple[StageTiming, ...]], None]


class StepRunner(Protocol):
    """What runs steps: the connected `Pipeline`, or `LocalPipeline` in this process."""

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


class LocalPipeline:
    """All stages in this process, called one after another: the reference for every split."""

    def __init__(self, stages: Sequence[StageCore]) -> None:
        self._stages = stages
        self._results: list[tuple[StepHeader, Sequence[int]]] = []

    async def send(self, step: Step) -> None:
        """Run the step at once."""
        self._results.append(self.run(step))

    async def receive(self) -> tuple[StepHeader, Sequence[int]]:
        """The oldest result."""
        return self._results.pop(0)

    def run(self, step: Step) -> tuple[StepHeader, Sequence[int]]:
        """Run one step through every stage."""
        tensor = token_ids_to_wire(step.token_ids)
        for stage in self._stages:
            tensor = stage.step(step.header, tensor)[0]
        return step.header, token_ids_from_wire(tensor).tolist()
