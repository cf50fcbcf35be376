"""What the decode loop runs its steps on."""

from collections.abc import Sequence
from typing import Protocol

from pipeline.engine.step import FollowUp, Notice, Step
from pipeline.engine.stored_text import SlotStages
from pipeline.protocol.step_results import StepResult
from transport.frozen import frozen


@frozen
class RunnerStats:
    """What it has taken to keep stages together: their loss is survived where the steps are run."""

    num_handshakes: int = 0
    num_failovers: int = 0
    # From noticing the last loss to the next result, or to stages that wait for one.
    recovery_seconds: float = 0.0


class StepRunner(SlotStages, Protocol):
    """What runs steps: the connected `Pipeline`, or a `LocalPipeline`."""

    @property
    def stats(self) -> RunnerStats:
        """Counters so far."""
        ...

    async def notify(self, notices: Sequence[Notice]) -> None:
        """Tell every stage which requests have started and ended."""
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
