"""From flags to a pipeline that stands: what generating once and serving have in common."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from pipeline.agreement.identity import ORCHESTRATOR_KEY, state_directory
from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import (
    DEV_WARNING,
    DevTrust,
    Trust,
    UserTrust,
    refuse_dev_where_keyed,
)
from pipeline.cli.compute_options import SLOW_KERNELS
from pipeline.cli.logs import tell
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.shard_directories import stage_dir
from pipeline.codecs.rotated_int8 import RotatedInt8
from pipeline.engine.limits import Limits
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError, PolicyError
from pipeline.files import is_file
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
from pipeline.orchestrator.outage import Watcher, outlast
from pipeline.placement.base import Placement
from pipeline.placement.by_hand import ByHand
from pipeline.placement.worker_supervisor import Supervisor
from pipeline.protocol.tide_window import MAX_TEXT, TideWindow
from pipeline.tasks import open_tasks
from transport.attestation.dev_authority import default_directory

logger = logging.getLogger(__name__)

PLAIN = "plain"
MODES_OF_PARTS = {"attention": "scx", "linear": "offload", "mixed-linear": "mix"}


@dataclass(frozen=True, slots=True)
class ManifestSource:
    """A manifest, where it came from, and the model that supervised workers load.

    `client_dir`: where the orchestrator's own part is unless a flag says so.
    """

    manifest: Manifest
    path: Path
    model_dir: Path | None
    client_dir: Path


def longest_text(context: int | None, manifest: Manifest, window: TideWindow | None) -> int:
    """The most tokens of a request: the model's, or under a window far more.

    Raises InputError for a --context, or a --window, that cannot be had.
    """
    longest = manifest.activation_spec.max_seq_len
    if window is not None:
        if window.size > longest:
            raise InputError(f"--window {window.size} is more than the model's context, {longest}")
        if context is not None and context > MAX_TEXT:
            raise InputError(f"--context {context} is more than a window's texts have, {MAX_TEXT}")
        return MAX_TEXT
    if context is not None and context > longest:
        raise InputError(f"--context {context} is more than the model's {longest}")
    return longest


def mode_of(manifest: Manifest) -> str:
    """What the leakage cards call the way in which a manifest uses its stages."""
    if manifest.part is not None:
        return MODES_OF_PARTS[manifest.part.kind]
    if manifest.home_stages is not None:
        return "scx-paper"
    if manifest.dp is not None:
        return "dp"
    if manifest.rotation is not None:
        is_rounded = manifest.activation_spec.dtype == RotatedInt8.name
        return "rotate-int8" if is_rounded else "rotate"
    return "client" if manifest.has_client_ends else PLAIN


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
        mode = mode_of(manifest)
        card = require_card(mode)
        if mode != PLAIN:  # for what that gives there are the warnings of `--dev` alone
            tell("pipeline-orch", f"mode {mode}: {card.protects}")
        given = flags.workers.given(has_client_ends=manifest.has_client_ends)
        if given and not flags.supervise:
            raise InputError(
                f"{given[0]} is for workers that are started here; give --supervise too"
            )
        trust = _trust(manifest, flags.identity, dev=flags.dev)
        options = PipelineOptions(
            limits,
            flags.connect_timeout,
            flags.results_at(manifest),
            flags.hang_timeout,
            patience_ms=patience_ms,
            ends=_ends(source, flags),
        )
        return cls(
            manifest=manifest,
            trust=trust,
            options=options,
            place=_placement(source, flags),
            # Of a worker that nobody trusts nobody expects that it stays.
            is_resumable=is_resumable or manifest.part is not None,
        )

    async def run(
        self,
        work: Work,
        source: ReplaySource,
        watcher: Watcher | None = None,
        *,
        outlasts: bool = False,
    ) -> None:
        """Do `work` on a pipeline; after a loss mend it and go on, where that is wanted.

        `source` is what `work` works off; `work` is called again after every loss. `watcher` hears
        of the pipeline; with `outlasts` nothing but what is set up wrongly ends it.

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
                patience_seconds = self.options.connect_seconds
                if watcher is not None:
                    watcher.made(pipeline)
                if watcher is not None and outlasts:
                    await outlast(pipeline, tell_and_work, source, patience_seconds, watcher.away)
                elif self.is_resumable:
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
    shared = ["--manifest", str(source.path), "--core", manifest.core_hash().hex()]
    shared += ["--log-format", flags.log_format, *(["--dev"] if flags.dev else [])]

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
        refuse_dev_where_keyed(manifest)
        logger.warning("event=development_mode %s", DEV_WARNING)
        return DevTrust.create(default_directory(os.environ))
    if identity is None and manifest.is_keyed:
        identity = state_directory(os.environ) / ORCHESTRATOR_KEY
        if not is_file(identity):
            raise PolicyError(
                f"this home has joined no machines, for it has no key {identity}; use the manifest "
                "where it was made, join them from here, or give --identity"
            )
    return UserTrust.create(manifest, identity)


def _progress(line: str) -> None:
    tell("pipeline-orch", line)
