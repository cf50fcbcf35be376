"""A pipeline without processes: the reference that every split is compared with."""

from collections import deque
from collections.abc import Sequence

from pipeline.engine.step import FollowUp, Notice, Step
from pipeline.engine.step_runner import RunnerStats
from pipeline.errors import StoreError
from pipeline.orchestrator.model_ends import REMOTE_ENDS, ModelEnds
from pipeline.protocol.step_results import StepResult
from pipeline.protocol.stored_state import Mark
from pipeline.stage.step_executor import StageCore

NO_STORE = "stages in this process have no store of sessions"


class LocalPipeline:
    """All stages in this process, called one after another: the reference for every split."""

    def __init__(self, stages: Sequence[StageCore], ends: ModelEnds = REMOTE_ENDS) -> None:
        self._stages = stages
        self._ends = ends
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

    async def save(self, *_: object) -> Sequence[Sequence[Mark]]:
        """Nothing outlives this process. Raises StoreError."""
        raise StoreError(NO_STORE)

    async def load(self, *_: object) -> None:
        """Nothing has outlived it. Raises StoreError."""
        raise StoreError(NO_STORE)

    def run(self, step: Step) -> StepResult:
        """Run one step through every stage."""
        header, tensors = self._ends.begin(step)
        for stage in self._stages:
            tensors = stage.step(header, tensors)
        return self._ends.end(step, header, tensors)
