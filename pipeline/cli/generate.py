"""Generating once: a prompt in, its continuation on stdout, latencies on stderr."""

import logging
from collections.abc import Awaitable, Callable
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
    tokenizer = Tokenizer(flags.tokenizer_path)
    if flags.door.door is not None:
        _generate(flags, pipeline_flags, manifest, tokenizer, None)
        return
    with flags.kept.opened(manifest, pipeline_flags.tide_window) as stored:
        _generate(flags, pipeline_flags, manifest, tokenizer, stored)


def _generate(
    flags: GenerateFlags,
    pipeline_flags: PipelineFlags,
    manifest: Manifest,
    tokenizer: Tokenizer,
    stored: "HomeSession | None",
) -> None:
    longest = longest_text(flags.context, manifest, pipeline_flags.tide_window)
    past_ids = () if stored is None else stored.record.token_ids
    prompt_ids = (*past_ids, *tokenizer.encode(flags.text, add_special_tokens=not past_ids))
    # No more than it takes: a model may have room for far more than its stages' memory.
    room = flags.context or min(len(prompt_ids) + flags.max_tokens, longest)
    limits = Limits(
        1,
        room,
        num_stages=len(manifest.stages),
        window=pipeline_flags.tide_window,
        is_length_asked=flags.context is not None,
    )
    eos = frozenset() if flags.ignore_eos else end_tokens(manifest, tokenizer)
    log = LatencyLog()
    budget = privacy_budget(manifest, pipeline_flags.dp_epsilon, pipeline_flags.dp_delta)
    engine = PipelineEngine(limits, budget)
    sampling = flags.sampling.params()
    text = StoppedText(tokenizer, prompt_ids, sampling.stop)
    printer = _Printer(flags.text, text, log)
    at_home = flags.sample_at == "home"
    generation = Generation(
        prompt_ids, flags.max_tokens, eos, sampling, stored=stored, samples_at_home=at_home
    )
    request_id = engine.submit(generation, printer.hear)
    printer.on_stop = lambda: engine.cancel(request_id, keeps=True)
    if budget is not None:
        tell_prompt(budget, len(prompt_ids), flags.max_tokens)
    path = flags.latency_out
    if path is not None:
        check_writable(path)
    home = client_dir(flags.model_dir or flags.tokenizer_path.parent)
    source = ManifestSource(manifest, flags.manifest, flags.model_dir, home)

    async def work(pipeline: Layers) -> None:
        tokenizer.check_vocabulary(pipeline.vocab_size)
        tokenizer.check_ids(prompt_ids)
        engine.allow_reuse(pipeline.is_row_exact)
        printer.start()
        await engine.drain(pipeline)
        printer.finish()

    run = _runner(flags, pipeline_flags, source, engine, work)

    async def run_in_time() -> None:
        try:
            with request_time(pipeline_flags.request_timeout) as printer.on_start:
                await run()
        except RequestTimedOut as error:
            printer.hear(error)
            printer.finish()

    number = run_until_signalled(run_in_time)
    if number is not None:
        raise typer.Exit(128 + number)
    if printer.is_cut:
        tell(
            "pipeline-orch",
            f"the text ends where the context of {engine.max_seq_len} tokens is full",
        )
    tell("latency", log.summary())
    if path is not None:
        log.write(path)


def _runner(
    flags: GenerateFlags,
    shared: PipelineFlags,
    source: ManifestSource,
    engine: PipelineEngine,
    work: Callable[[Layers], Awaitable[None]],
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
