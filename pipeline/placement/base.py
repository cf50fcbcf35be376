"""What an orchestrator asks of whoever runs the stages."""

from typing import NamedTuple, Protocol

from pipeline.agreement.addresses import StageEndpoint
from pipeline.errors import SessionError
from pipeline.worker_report import Loaded


class Progress(NamedTuple):
    """How far a stage that is not up yet has come."""

    # Which of its lives this is: another number for every process that is tried.
    life: int
    # Time that it has computed in this one.
    seconds: float
    # What it has read of its weights; None where it has not said.
    loaded: Loaded | None = None


class Placement(Protocol):
    """Where the stages of a manifest run.

    Addresses are not part of what stages are known by: a stage may come back elsewhere, and is
    found there as soon as `where` says so.
    """

    async def start(self, stage_idx: int) -> None:
        """Have a stage run from now on, unless it does; nothing where others see to that."""
        ...

    def where(self, stage_idx: int) -> StageEndpoint:
        """A stage's addresses now, asked before each dial.

        Raises ManifestError where it has none.
        """
        ...

    def on_loss(self, error: SessionError) -> None:
        """Hear that a stage is lost, and of what: one that hangs has to make way."""
        ...

    def progress(self, stage_idx: int) -> Progress | None:
        """How far a stage that is awaited has come; None where nobody can tell."""
        ...

    def problem(self, stage_idx: int) -> str | None:
        """Why a stage that is awaited cannot be started, if that is known."""
        ...
