"""Supervised workers wherever this machine has room for them, beside those of other pipelines."""

from collections.abc import Callable, Sequence

import trio

from pipeline.agreement.addresses import StageEndpoint, TcpAddress
from pipeline.agreement.manifest import Manifest
from pipeline.errors import ManifestError
from pipeline.placement.worker_supervisor import Supervisor
from transport.dial_and_listen import TcpEndpoint

HOST = "127.0.0.1"
_ANY_PORT = str(TcpEndpoint(HOST, 0))


class FreePortSupervisor(Supervisor):
    """As a supervisor, but no worker listens where the manifest says: that is another's place."""

    def __init__(
        self,
        manifest: Manifest,
        arguments: Callable[[int], Sequence[str]],
        tasks: trio.Nursery,
        alike: Callable[[int], Sequence[int]] = lambda _: (),
    ) -> None:
        """As `Supervisor`; workers have to be allowed to dial each other at `HOST`."""
        listen = ("--control-listen", _ANY_PORT, "--data-in-listen", _ANY_PORT)
        super().__init__(manifest, lambda idx: (*arguments(idx), *listen), tasks, self._look, alike)
        # Where each stage listens, or has last done so.
        self._addresses: list[StageEndpoint | None] = [None] * len(manifest.stages)
        self._changed = trio.Event()

    async def start(self, stage_idx: int) -> None:
        """Keep the stage's worker running from now on; returns once it listens."""
        await super().start(stage_idx)
        while self.listening(stage_idx) is None:
            await self._changed.wait()

    def where(self, stage_idx: int) -> StageEndpoint:
        """Where it listens, or has last done so. Raises ManifestError before it ever has."""
        own = self._addresses[stage_idx]
        if own is None:
            raise ManifestError(f"stage {stage_idx} does not listen yet")
        after = self._addresses[stage_idx + 1] if stage_idx + 1 < len(self._addresses) else None
        return own.model_copy(update={"data_out": after and after.data_in})

    @property
    def results_at(self) -> None:
        """Nowhere: the last stage is dialed for them."""
        return None

    def _look(self) -> None:
        for idx in range(len(self._addresses)):
            if (found := self.listening(idx)) is not None:
                control, data_in = (TcpAddress(type="tcp", addr=each) for each in found)
                self._addresses[idx] = StageEndpoint(control=control, data_in=data_in)
        self._changed.set()
        self._changed = trio.Event()
