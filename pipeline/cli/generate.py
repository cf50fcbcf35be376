"""Generating once: a prompt in, its continuation on stdout, latencies on stderr."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns

import trio
import typer

from pipeline.agreement.manifest import load_manifest
from pipeline.cli.access import ManifestSource, PipelineAccess, PipelineFlags, end_tokens
from pipeline.cli.common import run_until_signalled
from pipeline.cli.logs import tell
from pipeline.cli.terminal import write_text
from pipeline.engine.drive import drive
from pipeline.engine.latency import LatencyLog
from pipeline.engine.request import Request, TokenEvent
from pipeline.engine.scheduler import Limits, Scheduler
from pipeline.engine.tokenizer import TextStream, Tokenizer
from pipeline.errors import SessionError
from pipeline.files import check_writable
from pipeline.orchestrator.opening import Pipeline
from pipeline.protocol.messages import Abort, Done, StageTiming, Start
from pipeline.protocol.peers import GOODBYE_SECONDS, PATIENCE_MS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerateFlags:
    """What to generate, with what, and what to write beside it."""

    manifest: Path
    model_dir: Path | None
    tokenizer: Path
    text: str
    max_tokens: int
    ignore_eos: bool
    latency_out: Path | None


def generate(flags: GenerateFlags, pipeline_flags: PipelineFlags) -> None:
    """Run one prompt to its end. Raises PipelineError, or typer.Exit after a signal."""
    manifest = load_manifest(flags.manifest)
    tokenizer = Tokenizer(flags.tokenizer)
    longest = manifest.activation_spec.max_seq_len
    limits = Limits(num_slots=1, max_seq_len=longest, num_stages=len(manifest.stages))
    eos = frozenset() if flags.ignore_eos else end_tokens(manifest, tokenizer)
    request = Request(0, tokenizer.encode(flags.text), flags.max_tokens, eos)
    scheduler = Scheduler(limits)
    scheduler.submit(request)
    path = flags.latency_out
    if path is not None:
        check_writable(path)
    source = ManifestSource(manifest, flags.manifest, flags.model_dir)
    access = PipelineAccess.create(
        source, pipeline_flags, limits, is_resumable=False, patience_ms=PATIENCE_MS
    )
    log = LatencyLog()
    printer = _Printer(flags.text, TextStream(tokenizer, request.prompt_ids), log)

    async def work(pipeline: Pipeline) -> None:
        tokenizer.check_vocabulary(pipeline.vocab_size)
        tokenizer.check_ids(request.prompt_ids)
        if not printer.has_started:
            printer.start()  # first: a stage takes a second `start`, after a loss, for a mistake
            await pipeline.notify(Start(request_id=request.request_id, slot=0))
        outcome: Done | Abort = Abort(request_id=request.request_id)
        try:
            await drive(pipeline, scheduler, printer.on_token)
            printer.finish()
            outcome = Done(request_id=request.request_id)
        finally:
            # The user may have lost patience. After a loss it is not over yet.
            if not pipeline.is_broken:
                with trio.move_on_after(GOODBYE_SECONDS, shield=True), suppress(SessionError):
                    await pipeline.notify(outcome)

    number = run_until_signalled(lambda: access.run(work, scheduler))
    if number is not None:
        raise typer.Exit(128 + number)
    tell("latency", log.summary())
    if path is not None:
        log.write(path)


class _Printer:
    """Streams text to stdout and latencies to the log."""

    def __init__(self, prompt: str, stream: TextStream, log: LatencyLog) -> None:
        self._prompt = prompt
        self._stream = stream
        self._log = log
        self._last_ns = 0

    @property
    def has_started(self) -> bool:
        """Whether the prompt has been printed: after a loss, work begins again."""
        return self._last_ns != 0

    def start(self) -> None:
        """Print the prompt; time starts now."""
        write_text(self._prompt)
        self._last_ns = perf_counter_ns()

    def on_token(self, event: TokenEvent, timings: tuple[StageTiming, ...]) -> None:
        """Print one token's text."""
        now = perf_counter_ns()
        elapsed_ns, self._last_ns = now - self._last_ns, now
        self._log.add(event.token_id, elapsed_ns, timings)
        logger.debug("event=token n=%d ms=%.2f", len(self._log.token_ids), elapsed_ns / 1e6)
        write_text(self._stream.push(event.token_id))

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        write_text(self._stream.finish() + "\n")
