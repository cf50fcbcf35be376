"""From flags to a pipeline that stands: what generating once and serving have in common."""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from pipeline.engine.scheduler import Limits
from pipeline.errors import InputError, SessionError
from pipeline.manifest import Manifest
from pipeline.orchestrator import Pipeline, PipelineOptions, open_pipeline
from pipeline.supervisor import Supervisor, Work, run_with_failover, worker_arguments
from pipeline.tasks import open_tasks
from pipeline.trust import DEV_WARNING, DevTrust, Trust, UserTrust
from transport.attestation.dev import default_directory
from transport.endpoint import Endpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionFlags:
    """The flags of every command that drives a pipeline."""

    manifest_path: Path
    identity: Path | None
    is_dev: bool
    data_out_listen: Endpoint | None
    connect_seconds: float
    hang_seconds: float
    supervise: bool
    model_dir: Path | None
    threads: int


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the stages of a manifest, and what to do when one is lost."""

    manifest: Manifest
    trust: Trust
    options: PipelineOptions
    supervisor: Supervisor | None
    is_resumable: bool

    @classmethod
    def create(
        cls, manifest: Manifest, flags: ConnectionFlags, limits: Limits, *, is_resumable: bool
    ) -> "Connection":
        """Check the flags and the protection the manifest gives. Raises InputError."""
        supervisor = None
        if flags.supervise:
            if flags.model_dir is None:
                raise InputError("--supervise starts workers, which need --model-dir")
            arguments = worker_arguments(
                flags.manifest_path, flags.model_dir, threads=flags.threads, is_dev=flags.is_dev
            )
            supervisor = Supervisor(manifest, arguments)
        return cls(
            manifest=manifest,
            trust=_trust(manifest, flags.identity, dev=flags.is_dev),
            options=PipelineOptions(
                limits, flags.connect_seconds, flags.data_out_listen, flags.hang_seconds
            ),
            supervisor=supervisor,
            is_resumable=is_resumable or flags.supervise,
        )

    def open(self) -> AbstractAsyncContextManager[Pipeline]:
        """One session with every stage."""
        return open_pipeline(self.manifest, self.trust, self.options, _progress)

    async def run(self, work: Work, restart: Callable[[SessionError], None]) -> None:
        """Do `work` on a pipeline; after a loss call `restart` and go on, where that is wanted."""
        if not self.is_resumable:
            async with self.open() as pipeline:
                return await work(pipeline)

        def on_loss(error: SessionError) -> None:
            if self.supervisor is not None:
                self.supervisor.on_loss(error)
            restart(error)

        async with open_tasks() as tasks:
            if self.supervisor is not None:
                tasks.start_soon(self.supervisor.run)
            await run_with_failover(self.open, work, on_loss, self.options.connect_seconds)
            tasks.cancel_scope.cancel()
        return None


def _trust(manifest: Manifest, identity: Path | None, *, dev: bool) -> Trust:
    if dev:
        logger.warning("event=development_mode %s", DEV_WARNING)
        return DevTrust.create(default_directory(os.environ))
    return UserTrust.create(manifest, identity)


def _progress(line: str) -> None:
    print(f"pipeline-orch: {line}", file=sys.stderr)
