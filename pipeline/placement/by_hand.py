"""Stages that somebody else starts: at the addresses of a manifest, as it reads now."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pipeline.agreement.addresses import StageEndpoint
from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.agreement.templates import with_cids
from pipeline.errors import InputError, SessionError
from pipeline.placement.base import Progress, results_at
from transport.dial_and_listen import Endpoint

logger = logging.getLogger(__name__)


class ByHand:
    """Nobody restarts these stages; whoever moves one corrects the manifest's file.

    Addresses alone are taken from a file that has changed: what must run at them was decided, and
    maybe shown to the user, when the orchestrator started.
    """

    def __init__(
        self,
        manifest: Manifest,
        path: Path | None = None,
        cids: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """`path` is the file that `manifest` was read from, if addresses may change there.

        `cids` are those of started enclaves, by stage.
        """
        self._manifest = with_cids(manifest, cids)
        self._path = path
        self._cids = cids
        self._seen = self._version()

    async def start(self, stage_idx: int) -> None:
        """Whoever runs it sees to that."""

    def where(self, stage_idx: int) -> StageEndpoint:
        """Its addresses in the manifest. Raises ManifestError when that is only a core."""
        if self._seen != (version := self._version()):
            self._seen = version
            self._reload()
        return self._manifest.endpoint(stage_idx)

    @property
    def results_at(self) -> Endpoint | None:
        """Where the manifest says. Raises ManifestError when that is only a core."""
        return results_at(self._manifest)

    def on_loss(self, error: SessionError) -> None:
        """Whoever runs it will notice."""

    def progress(self, stage_idx: int) -> Progress | None:
        """Nobody here can tell."""
        del stage_idx
        return None

    def problem(self, stage_idx: int) -> str | None:
        """Whoever runs it knows."""
        del stage_idx
        return None

    def _version(self) -> tuple[int, int] | None:
        """What tells one state of the file from another."""
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def _reload(self) -> None:
        assert self._path is not None  # a version that changes has one
        try:
            found = with_cids(load_manifest(self._path), self._cids)
        except InputError as error:
            # It may be half written, or away for a moment.
            logger.warning("event=addresses_unreadable error=%s", error)
            return
        if found.core_hash() != self._manifest.core_hash():
            logger.warning("event=addresses_ignored manifest=%s reason=another_core", self._path)
            return
        moved = tuple(
            ours.model_copy(update={"endpoint": theirs.endpoint or ours.endpoint})
            for ours, theirs in zip(self._manifest.stages, found.stages, strict=True)
        )
        self._manifest = self._manifest.model_copy(update={"stages": moved})
        logger.info("event=addresses_read manifest=%s", self._path)
