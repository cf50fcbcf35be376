"""A pipeline without processes: the reference that every split is compared with."""

from collections import deque
from collections.abc import Sequence

from pipeline.engine.step import FollowUp, Notice, Step
from pipeline.engine.step_runner import RunnerStats
from pipeline.protocol.step_limits import step_tensors
from pipeline.protocol.step_results import StepResult, step_result
from pipeline.stage.step_executor import StageCore


class LocalPipeline:
    """All stages in this process, called one after another: the reference for every split."""

    def __init__(self, stages: Sequence[StageCore]) -> None:
        self._stages = stages
        self._results: deque[StepResult] = deque()

    @property
    def stats(self) -> RunnerStats:
        """Nothing is ever lost here."""
        return RunnerStats()

    async def notify(self, notices: Sequence[Notice]) -> None:
        """Whoever is called step by step needs no telling."""

    async def send(self, step: Step) -> None:
        """Run the step at once."""
        self._results.append(self.run(step))

    def prepare(self, follow_up: FollowUp | None) -> None:
        """Nothing waits here for what follows."""

    async def receive(self) -> StepResult:
        """The oldest result."""
        return self._results.popleft()

    def run(self, step: Step) -> StepResult:
        """Run one step through every stage."""
        tensors = step_tensors(step.header, step.token_ids, step.asked)
        for stage in self._stages:
            tensors = stage.step(step.header, tensors)
        return step_result(step.header, tensors)
