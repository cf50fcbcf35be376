"""Generating once: a prompt in, its continuation on stdout, latencies on stderr."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from time import perf_counter_ns
from typing import TYPE_CHECKING, Protocol

import trio
import typer

from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.cli.door import DoorAccess
from pipeline.cli.generate_flags import GenerateFlags
from pipeline.cli.logs import tell
from pipeline.cli.pipeline_access import (
    ManifestSource,
    PipelineAccess,
    end_tokens,
    longest_text,
)
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.placing import placed_early
from pipeline.cli.privacy_bound import privacy_budget, tell_prompt
from pipeline.cli.shard_directories import client_dir
from pipeline.cli.signals import run_until_signalled
from pipeline.cli.terminal import write_text
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation, TokenOutput
from pipeline.engine.latency import LatencyLog
from pipeline.engine.limits import Limits
from pipeline.engine.output_text import StoppedText
from pipeline.engine.request import FinishReason
from pipeline.engine.request_time import request_time
from pipeline.engine.step_runner import StepRunner
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import PipelineError, RequestTimedOut
from pipeline.files import check_writable
from pipeline.placement.base import Placement
from pipeline.protocol.peer_connections import PATIENCE_MS

if TYPE_CHECKING:
    from pipeline.sessions.session_book import HomeSession

logger = logging.getLogger(__name__)


class Layers(StepRunner, Protocol):
    """What a prompt runs on: stages, or a door."""

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        ...

    @property
    def is_row_exact(self) -> bool:
        """Whether rows are the same, bit for bit, in steps of any size."""
        ...


def generate(flags: GenerateFlags, pipeline_flags: PipelineFlags) -> None:
    """Run one prompt to its end. Raises PipelineError, or typer.Exit after a signal."""
    manifest = load_manifest(flags.manifest)
    if flags.door.door is not None:
        _generate(flags, pipeline_flags, manifest, None)
        return
    with flags.kept.opened(manifest, pipeline_flags.tide_window) as stored:
        _generate(flags, pipeline_flags, manifest, stored)


def _generate(
    flags: GenerateFlags,
    pipeline_flags: PipelineFlags,
    manifest: Manifest,
    stored: "HomeSession | None",
) -> None:
    path = flags.latency_out
    if path is not None:
        check_writable(path)
    text: _Text | None = None

    async def begin_early() -> None:
        nonlocal text
        early = placed_early(manifest, flags.manifest, flags.model_dir, pipeline_flags)
        async with early as place:
            # While workers load: a vocabulary takes a tenth of a second to read.
            tokenizer = await trio.to_thread.run_sync(
                Tokenizer, flags.tokenizer_path, abandon_on_cancel=True
            )
            text = _Text(flags, pipeline_flags, manifest, tokenizer, stored, place)
            await text.run()

    run = begin_early
    is_here = pipeline_flags.supervise and pipeline_flags.place is None
    if not is_here or manifest.has_client_ends or flags.door.door is not None:
        tokenizer = Tokenizer(flags.tokenizer_path)
        text = _Text(flags, pipeline_flags, manifest, tokenizer, stored, None)
        run = text.run
    number = run_until_signalled(run)
    if number is not None:
        raise typer.Exit(128 + number)
    assert text is not None, "it has run to its end"
    text.sum_up()
    if path is not None:
        text.log.write(path)


class _Text:
    """One prompt, and what becomes of it."""

    def __init__(
        self,
        flags: GenerateFlags,
        pipeline_flags: PipelineFlags,
        manifest: Manifest,
        tokenizer: Tokenizer,
        stored: "HomeSession | None",
        place: Callable[[trio.Nursery], Placement] | None,
    ) -> None:
        """`place`: how its stages are placed already. Raises PipelineError."""
        self.log = LatencyLog()
        self._tokenizer = tokenizer
        longest = longest_text(flags.context, manifest, pipeline_flags.tide_window)
        past_ids = () if stored is None else stored.record.token_ids
        new_ids = tokenizer.encode(flags.text, add_special_tokens=not past_ids)
        self._prompt_ids = (*past_ids, *new_ids)
        # No more than it takes: a model may have room for far more than its stages' memory.
        room = flags.context or min(len(self._prompt_ids) + flags.max_tokens, longest)
        limits = Limits(
            1,
            room,
            num_stages=len(manifest.stages),
            window=pipeline_flags.tide_window,
            is_length_asked=flags.context is not None,
        )
        eos = frozenset() if flags.ignore_eos else end_tokens(manifest, tokenizer)
        budget = privacy_budget(manifest, pipeline_flags.dp_epsilon, pipeline_flags.dp_delta)
        self._engine = PipelineEngine(limits, budget)
        sampling = flags.sampling.params()
        stopped = StoppedText(tokenizer, self._prompt_ids, sampling.stop)
        self._printer = printer = _Printer(flags.text, stopped, self.log)
        generation = Generation(
            self._prompt_ids,
            flags.max_tokens,
            eos,
            sampling,
            stored=stored,
            samples_at_home=flags.sample_at == "home",
        )
        request_id = self._engine.submit(generation, printer.hear)
        printer.on_stop = lambda: self._engine.cancel(request_id, keeps=True)
        if budget is not None:
            tell_prompt(budget, len(self._prompt_ids), flags.max_tokens)
        home = client_dir(flags.model_dir or flags.tokenizer_path.parent)
        source = ManifestSource(manifest, flags.manifest, flags.model_dir, home)
        self._run = _runner(flags, pipeline_flags, source, self._engine, self._work, place)
        self._timeout = pipeline_flags.request_timeout

    async def run(self) -> None:
        """Generate it."""
        printer = self._printer
        try:
            with request_time(self._timeout) as printer.on_start:
                await self._run()
        except RequestTimedOut as error:
            printer.hear(error)
            printer.finish()

    async def _work(self, pipeline: Layers) -> None:
        self._tokenizer.check_vocabulary(pipeline.vocab_size)
        self._tokenizer.check_ids(self._prompt_ids)
        self._engine.allow_reuse(pipeline.is_row_exact)
        self._printer.start()
        await self._engine.drain(pipeline)
        self._printer.finish()

    def sum_up(self) -> None:
        """Tell the user how it went."""
        if self._printer.is_cut:
            tell(
                "pipeline-orch",
                f"the text ends where the context of {self._engine.max_seq_len} tokens is full",
            )
        tell("latency", self.log.summary())


def _runner(
    flags: GenerateFlags,
    shared: PipelineFlags,
    source: ManifestSource,
    engine: PipelineEngine,
    work: Callable[[Layers], Awaitable[None]],
    place: Callable[[trio.Nursery], Placement] | None,
) -> Callable[[], Awaitable[None]]:
    """What does the work, on stages or behind a door. Raises PipelineError."""
    if flags.door.door is not None:
        behind = DoorAccess.create(source, flags.door, flags.kept, shared)
        return lambda: behind.run(work)
    access = PipelineAccess.create(
        source,
        shared,
        engine.scheduler.limits,
        is_resumable=shared.starts_workers and not flags.exit_on_loss,
        patience_ms=PATIENCE_MS,
    )
    if place is not None:
        access = replace(access, place=place)
    return lambda: access.run(work, engine.scheduler)


# As OpenAI names them; a request that was cancelled has none.
_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
}


class _Printer:
    """Streams text to stdout, up to a stop string, and latencies to the log."""

    def __init__(self, prompt: str, text: StoppedText, log: LatencyLog) -> None:
        self.on_start: Callable[[float], object] = lambda _: None
        self.on_stop: Callable[[], object] = lambda: None
        self.is_cut = False  # the context had no room for more
        self._prompt = prompt
        self._text = text
        self._log = log
        self._last_ns = 0
        self._failure: PipelineError | None = None

    def start(self) -> None:
        """Print the prompt; time starts now. After a loss this is done already."""
        if not self._last_ns:
            write_text(self._prompt)
            self._last_ns = perf_counter_ns()
            self.on_start(trio.current_time())

    def hear(self, event: TokenOutput | PipelineError) -> None:
        """Print one token's text."""
        if isinstance(event, PipelineError):
            self._failure = event
            return
        now = perf_counter_ns()
        elapsed_ns, self._last_ns = now - self._last_ns, now
        self._log.add(event.token_id, elapsed_ns, event.timings, event.home_times)
        self._log.finish_reason = None if event.finish is None else _REASONS[event.finish]
        self.is_cut |= event.finish is FinishReason.CONTEXT
        logger.debug("event=token n=%d ms=%.2f", len(self._log.token_ids), elapsed_ns / 1e6)
        text, is_stopped = self._text.push(event.token_id)
        write_text(text)
        if is_stopped:
            self._log.finish_reason = "stop"
            self.on_stop()

    def finish(self) -> None:
        """Print what was held back, and end the line. Raises why no more has come, if so."""
        text, _ = self._text.finish()
        write_text(text + "\n")
        if self._failure is not None:
            raise self._failure
