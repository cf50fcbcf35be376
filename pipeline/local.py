"""A pipeline without processes: the reference that every split is compared with."""

from collections.abc import Sequence

from pipeline.engine.scheduler import Step
from pipeline.messages import StepHeader
from pipeline.stage import StageCore
from pipeline.steps import token_ids_from_wire, token_ids_to_wire


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
