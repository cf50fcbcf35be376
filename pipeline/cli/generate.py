"""Generating once: a prompt in, its continuation on stdout, latencies on stderr."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns

import typer

from pipeline.agreement.manifest import load_manifest
from pipeline.cli.kv_store_flags import open_session
from pipeline.cli.logs import tell
from pipeline.cli.pipeline_flags import (
    ManifestSource,
    PipelineAccess,
    PipelineFlags,
    check_context,
    end_tokens,
)
from pipeline.cli.privacy_bound import privacy_budget, tell_prompt
from pipeline.cli.shard_directories import client_dir
from pipeline.cli.signals import run_until_signalled
from pipeline.cli.terminal import write_text
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation, TokenOutput
from pipeline.engine.latency import LatencyLog
from pipeline.engine.output_text import StoppedText
from pipeline.engine.scheduler import Limits
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import PipelineError
from pipeline.files import check_writable
from pipeline.orchestrator.open_pipeline import Pipeline
from pipeline.protocol.peer_connections import PATIENCE_MS
from pipeline.sampling.params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerateFlags:
    """What to generate, with what, and what to write beside it."""

    manifest: Path
    model_dir: Path | None
    tokenizer: Path
    text: str
    max_tokens: int
    context: int | None
    ignore_eos: bool
    latency_out: Path | None
    sampling: SamplingParams
    # The session that the text goes on from, and becomes.
    session: str | None = None
    secret_file: Path | None = None


def generate(flags: GenerateFlags, pipeline_flags: PipelineFlags) -> None:
    """Run one prompt to its end. Raises PipelineError, or typer.Exit after a signal."""
    manifest = load_manifest(flags.manifest)
    tokenizer = Tokenizer(flags.tokenizer)
    check_context(flags.context, manifest)
    stored = open_session(flags.session, flags.secret_file, manifest)
    past_ids = () if stored is None else stored.record.token_ids
    prompt_ids = (*past_ids, *tokenizer.encode(flags.text, add_special_tokens=not past_ids))
    # No more than it takes: a model may have room for far more than its stages' memory.
    needed = min(len(prompt_ids) + flags.max_tokens, manifest.activation_spec.max_seq_len)
    limits = Limits(1, flags.context or needed, num_stages=len(manifest.stages))
    eos = frozenset() if flags.ignore_eos else end_tokens(manifest, tokenizer)
    log = LatencyLog()
    budget = privacy_budget(manifest, pipeline_flags.dp_epsilon, pipeline_flags.dp_delta)
    engine = PipelineEngine(limits, budget)
    text = StoppedText(tokenizer, prompt_ids, flags.sampling.stop)
    printer = _Printer(flags.text, text, log)
    generation = Generation(prompt_ids, flags.max_tokens, eos, flags.sampling, stored=stored)
    request_id = engine.submit(generation, printer.hear)
    printer.on_stop = lambda: engine.cancel(request_id, keeps=True)
    if budget is not None:
        tell_prompt(budget, len(prompt_ids), flags.max_tokens)
    path = flags.latency_out
    if path is not None:
        check_writable(path)
    home = client_dir(flags.model_dir or flags.tokenizer.parent)
    source = ManifestSource(manifest, flags.manifest, flags.model_dir, home)
    access = PipelineAccess.create(
        source, pipeline_flags, limits, is_resumable=False, patience_ms=PATIENCE_MS
    )

    async def work(pipeline: Pipeline) -> None:
        tokenizer.check_vocabulary(pipeline.vocab_size)
        tokenizer.check_ids(prompt_ids)
        engine.allow_reuse(pipeline.is_row_exact)
        printer.start()
        await engine.drain(pipeline)
        printer.finish()

    with nullcontext() if stored is None else stored.held():
        number = run_until_signalled(lambda: access.run(work, engine.scheduler))
    if number is not None:
        raise typer.Exit(128 + number)
    tell("latency", log.summary())
    if path is not None:
        log.write(path)


class _Printer:
    """Streams text to stdout, up to a stop string, and latencies to the log."""

    def __init__(self, prompt: str, text: StoppedText, log: LatencyLog) -> None:
        self.on_stop: Callable[[], object] = lambda: None
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

    def hear(self, event: TokenOutput | PipelineError) -> None:
        """Print one token's text."""
        if isinstance(event, PipelineError):
            self._failure = event
            return
        now = perf_counter_ns()
        elapsed_ns, self._last_ns = now - self._last_ns, now
        self._log.add(event.token_id, elapsed_ns, event.timings, event.home_times)
        logger.debug("event=token n=%d ms=%.2f", len(self._log.token_ids), elapsed_ns / 1e6)
        text, is_stopped = self._text.push(event.token_id)
        write_text(text)
        if is_stopped:
            self.on_stop()

    def finish(self) -> None:
        """Print what was held back, and end the line. Raises why no more has come, if so."""
        text, _ = self._text.finish()
        write_text(text + "\n")
        if self._failure is not None:
            raise self._failure
