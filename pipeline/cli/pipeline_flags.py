"""From flags to a pipeline that stands: what generating once and serving have in common."""

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import trio
import typer

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import DEV_WARNING, DevTrust, Trust, UserTrust
from pipeline.cli.compute_options import (
    CPUS_HELP,
    SLOW_KERNELS,
    DeviceOption,
    DTypeOption,
    KernelsOption,
    KvMemoryOption,
    ThreadsOption,
    WorkerOptions,
)
from pipeline.cli.kv_store_flags import KvMaxBytesOption, KvStoreOption, KvTtlOption
from pipeline.cli.logs import LogFormat, LogFormatOption, tell
from pipeline.cli.shard_directories import stage_dir
from pipeline.cli.shared_options import (
    DataOutPortOption,
    DevOption,
    finite,
    results_address,
    to_endpoint,
)
from pipeline.codecs.rotated_int8 import RotatedInt8
from pipeline.engine.scheduler import Limits
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.leakage.cards import require_card
from pipeline.orchestrator.epochs import ReplaySource
from pipeline.orchestrator.failover import Work, run_with_failover
from pipeline.orchestrator.model_ends import REMOTE_ENDS, ModelEnds
from pipeline.orchestrator.open_pipeline import (
    Pipeline,
    PipelineOptions,
    new_pipeline,
    open_pipeline,
)
from pipeline.placement.base import Placement
from pipeline.placement.by_hand import ByHand
from pipeline.placement.worker_supervisor import Supervisor
from pipeline.tasks import open_tasks
from transport.attestation.dev_authority import default_directory
from transport.dial_and_listen import Endpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PipelineFlags:
    """The flags of every command that drives a pipeline."""

    identity: Path | None
    is_dev: bool
    data_out_listen: Endpoint | None
    data_out_port: int | None
    connect_seconds: float
    hang_seconds: float
    supervise: bool
    workers: WorkerOptions
    client_part: Path | None
    dp_epsilon: float | None
    dp_delta: float | None
    log_format: LogFormat

    def results_at(self, manifest: Manifest) -> Endpoint | None:
        """Where to listen for results; None for the manifest's address. Raises InputError."""
        last = len(manifest.stages) - 1
        return results_address(manifest, last, self.data_out_listen, self.data_out_port)


def pipeline_flags(
    data_out_listen: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Where the last stage delivers [last stage's data_out]."),
    ] = None,
    data_out_port: DataOutPortOption = None,
    connect_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="Patience with stages not up nor loading.",
            callback=finite,
        ),
    ] = 30.0,
    identity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="This orchestrator's key (see keygen).")
    ] = None,
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Start the workers here, and survive their death.")
    ] = False,
    dtype: DTypeOption = None,
    kernels: KernelsOption = None,
    threads: ThreadsOption = None,
    cpus: Annotated[
        str | None,
        typer.Option(metavar="LIST", help=f"{CPUS_HELP}; a / between stages [none]."),
    ] = None,
    device: DeviceOption = None,
    kv_memory: KvMemoryOption = None,
    kv_store: KvStoreOption = None,
    kv_ttl: KvTtlOption = None,
    kv_max_bytes: KvMaxBytesOption = None,
    client_part: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Embedding and head, for split client [--model-dir, or where the tokenizer is].",
        ),
    ] = None,
    dp_epsilon: Annotated[
        float | None,
        typer.Option(metavar="E", help="Bound on what noisy rows tell [2 at a terminal]."),
    ] = None,
    dp_delta: Annotated[
        float | None, typer.Option(metavar="D", help="The delta of that epsilon [1e-5].")
    ] = None,
    hang_timeout: Annotated[
        float,
        typer.Option(
            min=0.5, metavar="SECONDS", help="Patience with a silent stage.", callback=finite
        ),
    ] = 60.0,
    dev: DevOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> PipelineFlags:
    """What the command line says. Raises InputError."""
    kept = kv_store, kv_ttl, kv_max_bytes
    workers = WorkerOptions(dtype, kernels, threads, cpus, device, kv_memory, *kept)
    return PipelineFlags(
        identity=identity,
        is_dev=dev,
        data_out_listen=to_endpoint(data_out_listen, "--data-out-listen"),
        data_out_port=data_out_port,
        connect_seconds=connect_timeout,
        hang_seconds=hang_timeout,
        supervise=supervise,
        workers=workers,
        client_part=client_part,
        dp_epsilon=dp_epsilon,
        dp_delta=dp_delta,
        log_format=log_format,
    )


Command = Callable[..., Any]


def takes_flags(**groups: Callable[..., Any]) -> Callable[[Command], Command]:
    """Give a typer command the flags of other functions too: it gets what `name` makes of them.

    Such a function may take those of further ones in the same way.
    """

    def add(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        flags = {
            name: inspect.signature(group, eval_str=True).parameters
            for name, group in groups.items()
        }

        @wraps(command)
        def run(**values: Any) -> Any:  # noqa: ANN401  (what typer found on the command line)
            for name, group in groups.items():
                values[name] = group(**{flag: values.pop(flag) for flag in flags[name]})
            return command(**values)

        merged = [each for each in own.values() if each.name not in groups]
        for group in flags.values():
            merged += group.values()
        # By name only: then those that must be given may come after those that need not.
        by_name = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in merged]
        run.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
        return run

    return add


@dataclass(frozen=True, slots=True)
class ManifestSource:
    """A manifest, where it came from, and the model that supervised workers load.

    `client_dir`: where the orchestrator's own part is unless a flag says so.
    """

    manifest: Manifest
    path: Path
    model_dir: Path | None
    client_dir: Path


def check_context(context: int | None, manifest: Manifest) -> None:
    """Raises InputError for a --context that the model does not have."""
    longest = manifest.activation_spec.max_seq_len
    if context is not None and context > longest:
        raise InputError(f"--context {context} is more than the model's {longest}")


def mode_of(manifest: Manifest) -> str:
    """What the leakage cards call the way in which a manifest uses its stages."""
    if manifest.dp is not None:
        return "dp"
    if manifest.rotation is not None:
        is_rounded = manifest.activation_spec.dtype == RotatedInt8.name
        return "rotate-int8" if is_rounded else "rotate"
    return "client" if manifest.has_client_ends else "plain"


@dataclass(frozen=True, slots=True)
class PipelineAccess:
    """How to reach the stages of a manifest, and what to do when one is lost."""

    manifest: Manifest
    trust: Trust
    options: PipelineOptions
    place: Callable[[trio.Nursery], Placement]
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
        require_card(mode_of(manifest))
        given = flags.workers.given(has_client_ends=manifest.has_client_ends)
        if given and not flags.supervise:
            raise InputError(
                f"{given[0]} is for workers that are started here; give --supervise too"
            )
        trust = _trust(manifest, flags.identity, dev=flags.is_dev)
        options = PipelineOptions(
            limits,
            flags.connect_seconds,
            flags.results_at(manifest),
            flags.hang_seconds,
            patience_ms=patience_ms,
            ends=_ends(source, flags),
        )
        return cls(
            manifest=manifest,
            trust=trust,
            options=options,
            place=_placement(source, flags),
            is_resumable=is_resumable or flags.supervise,
        )

    async def run(self, work: Work, source: ReplaySource) -> None:
        """Do `work` on a pipeline; after a loss mend it and go on, where that is wanted.

        `source` is what `work` works off; `work` is called again after every loss.

        Raises SessionError, and InputError for what workers started here cannot use.
        """
        has_told = False

        async def tell_and_work(pipeline: Pipeline) -> None:
            nonlocal has_told
            if not has_told:
                _tell_kernels(pipeline)
            has_told = True
            await work(pipeline)

        new = new_pipeline if self.is_resumable else open_pipeline
        async with open_tasks() as tasks:
            placement = self.place(tasks)
            async with new(
                self.manifest, self.trust, self.options, _progress, placement
            ) as pipeline:
                if self.is_resumable:
                    patience_seconds = self.options.connect_seconds
                    await run_with_failover(pipeline, tell_and_work, source, patience_seconds)
                else:
                    await tell_and_work(pipeline)
            tasks.cancel_scope.cancel()


def _tell_kernels(pipeline: Pipeline) -> None:
    """Slow kernels give the same text, so that nothing else would tell the user of them."""
    slow = [str(each.stage_idx) for each in pipeline.ready if each.kernels == SLOW_KERNELS]
    if slow:
        logger.warning(
            "event=slow_kernels stages=%s kernels=%s: `stage-worker --kernels native` says why",
            ",".join(slow),
            SLOW_KERNELS,
        )


def _placement(source: ManifestSource, flags: PipelineFlags) -> Callable[[trio.Nursery], Placement]:
    """How stages are placed, given tasks to watch over them. Raises InputError."""
    manifest, model_dir = source.manifest, source.model_dir
    if not flags.supervise:
        return lambda _: ByHand(manifest, source.path)
    if model_dir is None:
        raise InputError("--supervise starts workers, which need --model-dir")
    own = flags.workers.arguments(manifest)
    shared = ["--manifest", str(source.path)]
    shared += ["--log-format", flags.log_format, *(["--dev"] if flags.is_dev else [])]

    results_at = flags.results_at(manifest)
    last = len(manifest.stages) - 1

    def arguments(stage_idx: int) -> Sequence[str]:
        # Where the manifest does not say it, the last worker has to be told where results go.
        is_elsewhere = stage_idx == last and results_at is not None
        target = ("--data-out-target", str(results_at)) if is_elsewhere else ()
        model = ("--model-dir", str(stage_dir(model_dir, stage_idx)))
        return (*shared, *model, *own[stage_idx], *target)

    return lambda tasks: Supervisor(manifest, arguments, tasks)


def end_tokens(manifest: Manifest, tokenizer: Tokenizer) -> frozenset[int]:
    """What ends a text: by the manifest, and by the files beside the tokenizer.

    Raises TokenizerError.
    """
    ends = frozenset(manifest.eos_token_ids) | tokenizer.end_token_ids
    if not ends:
        logger.warning(
            "event=no_end_token detail=%r", "the model names none, so only lengths end a text"
        )
    return ends


def _ends(source: ManifestSource, flags: PipelineFlags) -> ModelEnds:
    """What holds the ends of the model. Raises ModelError, InputError."""
    if source.manifest.has_client_ends:
        from pipeline.cli.client_part import load_client_ends  # numpy's and the kernels' time

        path = flags.client_part or source.client_dir
        return load_client_ends(source.manifest, path, flags.workers)
    if flags.client_part is not None:
        raise InputError("--client-part: the manifest's split is stages, which hold all themselves")
    return REMOTE_ENDS


def _trust(manifest: Manifest, identity: Path | None, *, dev: bool) -> Trust:
    if dev:
        logger.warning("event=development_mode %s", DEV_WARNING)
        return DevTrust.create(default_directory(os.environ))
    return UserTrust.create(manifest, identity)


def _progress(line: str) -> None:
    tell("pipeline-orch", line)
