"""From flags to a pipeline that stands: what generating once and serving have in common."""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from pipeline.agreement.identity import ORCHESTRATOR_KEY, state_directory
from pipeline.agreement.manifest import Manifest
from pipeline.agreement.templates import require_cids, with_cids
from pipeline.agreement.trust_policy import Trust, UserTrust
from pipeline.cli.compute_options import SLOW_KERNELS
from pipeline.cli.loading_bars import LoadingBars
from pipeline.cli.logs import tell
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.placing import ALONE, Replica, placing
from pipeline.codecs.rotated_int8 import RotatedInt8
from pipeline.engine.limits import Limits
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import (
    InputError,
    PipelineError,
    PolicyError,
    SessionError,
    SessionRefused,
    StageMismatch,
)
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
from pipeline.orchestrator.outage import LAST_PAUSE_SECONDS, Watcher, outlast
from pipeline.placement.base import Placement
from pipeline.protocol.tide_window import MAX_TEXT, TideWindow
from pipeline.tasks import open_tasks
from transport.frozen import frozen

logger = logging.getLogger(__name__)

PLAIN = "plain"
MODES_OF_PARTS = {"attention": "scx", "linear": "offload", "mixed-linear": "mix"}


@frozen
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


@frozen
class PipelineAccess:
    """How to reach the stages of a manifest, and what to do when one is lost."""

    manifest: Manifest
    trust: Trust
    options: PipelineOptions
    place: Callable[[trio.Nursery], Placement]
    is_resumable: bool
    # Has the model split over the machines that are left; None where that is not wanted.
    move: Callable[[], Awaitable["PipelineAccess"]] | None = None
    # Whether a terminal shows how far its stages have loaded: there is one place for that.
    shows_loading: bool = True

    @classmethod
    def create(
        cls,
        source: ManifestSource,
        flags: PipelineFlags,
        limits: Limits,
        *,
        is_resumable: bool,
        patience_ms: int = 0,
        replica: Replica = ALONE,
    ) -> "PipelineAccess":
        """Check the flags and the protection the manifest gives. Raises InputError."""
        manifest = with_cids(source.manifest, flags.cids)
        if flags.place is None:
            require_cids(manifest)
        mode = mode_of(manifest)
        card = require_card(mode)
        if mode != PLAIN:  # for what that gives there are the warnings of `--dev` alone
            tell("pipeline-orch", f"mode {mode}: {card.protects}")
        given = flags.workers.given(has_client_ends=manifest.has_client_ends)
        if given and not flags.starts_workers:
            raise InputError(
                f"{given[0]} is for workers that are started here; give --supervise too"
            )
        if flags.ray.given and flags.place is None:
            raise InputError(f"{flags.ray.given[0]} is of a Ray cluster; give --place ray too")
        trust = _trust(manifest, flags)
        options = PipelineOptions(
            limits,
            flags.times,
            flags.results_at(manifest),
            patience_ms=patience_ms,
            ends=_ends(source, flags),
        )
        again = partial(
            cls.create, flags=flags, limits=limits, is_resumable=True, patience_ms=patience_ms
        )
        move = _mover(source, flags, again)
        return cls(
            manifest=manifest,
            trust=trust,
            options=options,
            place=placing(manifest, source.path, source.model_dir, flags, replica),
            # Of a worker that nobody trusts nobody expects that it stays.
            is_resumable=is_resumable or move is not None or manifest.part is not None,
            move=move,
        )

    @classmethod
    def replicas(
        cls, source: ManifestSource, flags: PipelineFlags, limits: Limits, count: int
    ) -> Sequence["PipelineAccess"]:
        """As many, each to stages of its own, and all as `create` has them. Raises InputError."""
        if count > 1 and source.manifest.dp is not None:
            raise InputError("--replicas: what noisy rows tell is counted for one pipeline alone")
        first = cls.create(source, flags, limits, is_resumable=True, replica=Replica(0, count))
        return [first, *(first._beside(source, flags, Replica(i, count)) for i in range(1, count))]

    def _beside(
        self, source: ManifestSource, flags: PipelineFlags, replica: Replica
    ) -> "PipelineAccess":
        place = placing(self.manifest, source.path, source.model_dir, flags, replica)
        # What holds the ends of the model has room for one step, of one pipeline.
        options = replace(self.options, ends=_ends(source, flags))
        return replace(self, place=place, options=options, shows_loading=False)

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
        access, has_stood = self, False

        async def note_and_work(pipeline: Pipeline) -> None:
            nonlocal has_stood
            if not has_stood:
                _tell_kernels(pipeline)
                access._tell_memory(pipeline)
            has_stood = True
            if not access.is_resumable and pipeline.kv_pool is not None:
                source.use_pool(pipeline.kv_pool.num_tokens)
            await work(pipeline)

        while True:
            try:
                return await access._run(note_and_work, source, watcher, outlasts=outlasts)
            except SessionError as error:
                is_wrong = isinstance(error, SessionRefused | StageMismatch) and not has_stood
                is_refused = isinstance(error, SessionRefused) and not outlasts
                if access.move is None or is_wrong or is_refused:
                    raise
                access = await access._moved(error, watcher if outlasts else None)

    async def _moved(self, error: SessionError, watcher: Watcher | None) -> "PipelineAccess":
        """To the machines that are left; with a watcher, this again where that cannot be.

        Raises PipelineError.
        """
        assert self.move is not None  # its caller has looked
        logger.warning("event=replanning error=%s", error)
        try:
            return await self.move()
        except PipelineError as problem:
            if watcher is None:
                raise
            logger.error("event=not_replanned error=%s", problem)
            watcher.away(SessionError(f"{error}; {problem}"))
        await trio.sleep(LAST_PAUSE_SECONDS)
        return self

    async def _run(
        self, work: Work, source: ReplaySource, watcher: Watcher | None, *, outlasts: bool
    ) -> None:
        """As `run`, over these stages alone."""
        new = new_pipeline if self.is_resumable else open_pipeline
        async with open_tasks() as tasks:
            placement = self.place(tasks)
            bars = LoadingBars(placement, len(self.manifest.stages))
            if self.shows_loading:
                tasks.start_soon(bars.follow)

            async def loaded_and_work(pipeline: Pipeline) -> None:
                bars.end()
                await work(pipeline)

            async with new(
                self.manifest, self.trust, self.options, _progress, placement
            ) as pipeline:
                patience_seconds = self.options.times.connect_seconds
                if watcher is not None:
                    watcher.made(pipeline)
                if watcher is not None and outlasts and self.move is None:
                    await outlast(pipeline, loaded_and_work, source, patience_seconds, watcher.away)
                elif self.is_resumable:
                    await run_with_failover(pipeline, loaded_and_work, source, patience_seconds)
                else:
                    await loaded_and_work(pipeline)
            tasks.cancel_scope.cancel()

    def _tell_memory(self, pipeline: Pipeline) -> None:
        """Raises InputError where no request can be as long as has been asked for."""
        limits, pool = self.options.limits, pipeline.kv_pool
        if pool is None:
            return
        if limits.is_length_asked and pool.num_tokens < limits.max_rows:
            raise InputError(
                f"a stage has KV memory for {pool.num_tokens} tokens in all, and a request is to "
                f"have {limits.max_rows}; ask for less with --context, or give it more with "
                "--kv-memory"
            )
        context = min(limits.max_seq_len, pool.num_tokens) if limits.window is None else 0
        logger.info(
            "event=kv_memory detail=%r",
            pool.told(context or limits.max_seq_len, limits.num_slots),
        )


def _tell_kernels(pipeline: Pipeline) -> None:
    """Slow kernels give the same text, so that nothing else would tell the user of them."""
    slow = [str(each.stage_idx) for each in pipeline.ready if each.kernels == SLOW_KERNELS]
    if slow:
        logger.warning(
            "event=slow_kernels stages=%s kernels=%s: `stage-worker --kernels native` says why",
            ",".join(slow),
            SLOW_KERNELS,
        )


def _mover(
    source: ManifestSource,
    flags: PipelineFlags,
    again: Callable[[ManifestSource], PipelineAccess],
) -> Callable[[], Awaitable[PipelineAccess]] | None:
    """What has the model split anew, if that is wanted. Raises InputError where it cannot be."""
    if not flags.replan:
        return None
    if flags.starts_workers or flags.identity is not None or mode_of(source.manifest) != PLAIN:
        raise InputError("--replan is for machines that this home has joined, and plain manifests")
    if source.model_dir is None:
        raise InputError("--replan cuts the model anew; give --model-dir, the whole of it")
    from pipeline.cli.replan import Replan  # planning, which no other start needs

    replan = Replan(source.manifest, source.path, source.model_dir)
    replan.check()

    async def move() -> PipelineAccess:
        manifest, path = await replan()
        return again(replace(source, manifest=manifest, path=path))

    return move


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


def _trust(manifest: Manifest, flags: PipelineFlags) -> Trust:
    if (trust := flags.development.trust(manifest)) is not None:
        return trust
    identity = flags.identity
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
