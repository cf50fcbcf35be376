"""What an orchestrator asks of whoever runs the stages."""

from typing import NamedTuple, Protocol

from pipeline.agreement.addresses import StageEndpoint
from pipeline.agreement.manifest import Manifest
from pipeline.errors import SessionError
from pipeline.worker_report import Loaded
from transport.dial_and_listen import Endpoint


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
        """Have a stage run from now on, unless it does; nothing where others see to that.

        Returns once it is known where, as far as that is for a placement to find out.
        """
        ...

    def where(self, stage_idx: int) -> StageEndpoint:
        """A stage's addresses now, asked before each dial, and after `start`.

        Raises ManifestError where it has none.
        """
        ...

    @property
    def results_at(self) -> Endpoint | None:
        """Where the last stage delivers its results; None: it is dialed for them.

        Asked before any stage is started. Raises ManifestError.
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


def results_at(manifest: Manifest) -> Endpoint | None:
    """Where a manifest has results delivered. Raises ManifestError where it is only a core."""
    data_out = manifest.endpoint(len(manifest.stages) - 1).data_out
    return None if data_out is None else data_out.to_endpoint()
