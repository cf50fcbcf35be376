"""From flags to a pipeline that stands: what generating once and serving have in common."""

import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust import DEV_WARNING, DevTrust, Trust, UserTrust
from pipeline.cli.common import DevOption, to_endpoint
from pipeline.cli.logs import LogFormat, LogFormatOption, tell
from pipeline.engine.scheduler import Limits
from pipeline.errors import InputError
from pipeline.orchestrator.failover import Work, run_with_failover
from pipeline.orchestrator.opening import PipelineOptions, new_pipeline, open_pipeline
from pipeline.orchestrator.remote_pipeline import ReplaySource
from pipeline.placement.supervisor import Supervisor, worker_arguments
from pipeline.tasks import open_tasks
from transport.attestation.dev import default_directory
from transport.endpoint import Endpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PipelineFlags:
    """The flags of every command that drives a pipeline."""

    identity: Path | None
    is_dev: bool
    data_out_listen: Endpoint | None
    connect_seconds: float
    hang_seconds: float
    supervise: bool
    threads: int
    log_format: LogFormat


def pipeline_flags(
    data_out_listen: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Where the last stage delivers [last stage's data_out]."),
    ] = None,
    connect_timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Patience with stages not up.")
    ] = 30.0,
    identity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="This orchestrator's key (see keygen).")
    ] = None,
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Start the workers here, and survive their death.")
    ] = False,
    threads: Annotated[
        int, typer.Option(min=1, metavar="N", help="Threads of each worker, with --supervise.")
    ] = 1,
    hang_timeout: Annotated[
        float, typer.Option(min=0.5, metavar="SECONDS", help="Patience with a silent stage.")
    ] = 60.0,
    dev: DevOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> PipelineFlags:
    """What the command line says. Raises InputError."""
    return PipelineFlags(
        identity=identity,
        is_dev=dev,
        data_out_listen=to_endpoint(data_out_listen, "--data-out-listen"),
        connect_seconds=connect_timeout,
        hang_seconds=hang_timeout,
        supervise=supervise,
        threads=threads,
        log_format=log_format,
    )


Command = Callable[..., None]


def takes_flags(**groups: Callable[..., Any]) -> Callable[[Command], Command]:
    """Give a typer command the flags of other functions too: it gets what `name` makes of them."""

    def add(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        flags = {
            name: inspect.signature(group, eval_str=True).parameters
            for name, group in groups.items()
        }

        @wraps(command)
        def run(**values: Any) -> None:  # noqa: ANN401  (what typer found on the command line)
            for name, group in groups.items():
                values[name] = group(**{flag: values.pop(flag) for flag in flags[name]})
            command(**values)

        merged = [each for each in own.values() if each.name not in groups]
        for group in flags.values():
            merged += group.values()
        run.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
        return run

    return add


@dataclass(frozen=True, slots=True)
class ManifestSource:
    """A manifest, where it came from, and the model that supervised workers load."""

    manifest: Manifest
    path: Path
    model_dir: Path | None


@dataclass(frozen=True, slots=True)
class PipelineAccess:
    """How to reach the stages of a manifest, and what to do when one is lost."""

    manifest: Manifest
    trust: Trust
    options: PipelineOptions
    supervisor: Supervisor | None
    is_resumable: bool

    @classmethod
    def create(
        cls,
        source: ManifestSource,
        flags: PipelineFlags,
        limits: Limits,
        *,
        is_resumable: bool,
        patience_ms: int = 0,
    ) -> "PipelineAccess":
        """Check the flags and the protection the manifest gives. Raises InputError."""
        manifest = source.manifest
        supervisor = None
        if flags.supervise:
            if source.model_dir is None:
                raise InputError("--supervise starts workers, which need --model-dir")
            arguments = worker_arguments(
                source.path, source.model_dir, threads=flags.threads, is_dev=flags.is_dev
            )
            arguments += ("--log-format", flags.log_format)
            supervisor = Supervisor(manifest, arguments)
        options = PipelineOptions(
            limits,
            flags.connect_seconds,
            flags.data_out_listen,
            flags.hang_seconds,
            patience_ms=patience_ms,
        )
        if supervisor is not None:
            options = replace(options, on_loss=supervisor.on_loss)
        return cls(
            manifest=manifest,
            trust=_trust(manifest, flags.identity, dev=flags.is_dev),
            options=options,
            supervisor=supervisor,
            is_resumable=is_resumable or flags.supervise,
        )

    async def run(self, work: Work, source: ReplaySource) -> None:
        """Do `work` on a pipeline; after a loss mend it and go on, where that is wanted.

        `source` is what `work` works off; `work` is called again after every loss.
        """
        if not self.is_resumable:
            async with open_pipeline(
                self.manifest, self.trust, self.options, _progress
            ) as pipeline:
                return await work(pipeline)
        async with open_tasks() as tasks:
            if self.supervisor is not None:
                tasks.start_soon(self.supervisor.run)
            async with new_pipeline(self.manifest, self.trust, self.options, _progress) as pipeline:
                await run_with_failover(pipeline, work, source, self.options.connect_seconds)
            tasks.cancel_scope.cancel()
        return None


def _trust(manifest: Manifest, identity: Path | None, *, dev: bool) -> Trust:
    if dev:
        logger.warning("event=development_mode %s", DEV_WARNING)
        return DevTrust.create(default_directory(os.environ))
    return UserTrust.create(manifest, identity)


def _progress(line: str) -> None:
    tell("pipeline-orch", line)
