"""Serving: an OpenAI-compatible API on the user's machine, in front of one pipeline."""

import logging
import resource
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
import typer
from prometheus_client import CollectorRegistry

from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.cli.kv_store_flags import session_book
from pipeline.cli.pipeline_flags import (
    ManifestSource,
    PipelineAccess,
    PipelineFlags,
    check_context,
    end_tokens,
)
from pipeline.cli.privacy_bound import privacy_budget
from pipeline.cli.shard_directories import client_dir
from pipeline.cli.signals import run_until_signalled
from pipeline.cli.stego_model import new_service
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.idle_prefixes import NO_PREFIXES, PrefixOptions
from pipeline.engine.scheduler import Limits
from pipeline.errors import InputError, PipelineError, SessionError
from pipeline.files import is_file
from pipeline.gateway.auth import load_api_keys
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.desk import Desk
from pipeline.gateway.http.server import listen
from pipeline.gateway.http.server import serve as serve_http
from pipeline.gateway.http.stego import stego_routes
from pipeline.gateway.http.tls import load_tls
from pipeline.gateway.metrics import GatewayMetrics
from pipeline.gateway.pipeline_status import Overview
from pipeline.gateway.rate_limits import GatewayLimits
from pipeline.gateway.settings import GatewayConfig
from pipeline.gateway.templates import ChatTemplate
from pipeline.models.config import CONFIG_FILE, load_config
from pipeline.orchestrator.open_pipeline import Pipeline
from pipeline.stego.service import StegoService
from pipeline.tasks import open_tasks

logger = logging.getLogger(__name__)

# Open files beside clients' connections: stages, workers, listeners, libraries.
_OTHER_FILES = 128
# For the answers of those who wait when the pipeline has failed for good.
_LAST_ANSWER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ServeFlags:
    """What to serve where, and how many requests at once."""

    manifest: Path
    model_dir: Path
    host: str
    port: int
    api_key_file: Path | None
    served_model_name: str | None
    max_batch: int
    chunk_tokens: int
    context: int | None
    limits: GatewayLimits
    tls_cert: Path | None = None
    tls_key: Path | None = None
    prefixes: PrefixOptions = NO_PREFIXES
    secret_file: Path | None = None


def serve(flags: ServeFlags, pipeline_flags: PipelineFlags) -> None:
    """Serve until stopped. Raises PipelineError, or typer.Exit after a signal."""
    _allow_open_files(flags.limits.max_connections + _OTHER_FILES)
    manifest = load_manifest(flags.manifest)
    limits = _limits(flags, manifest)
    home = client_dir(flags.model_dir)
    tokenizer = GatewayTokenizer(home / "tokenizer.json")
    if is_file(home / CONFIG_FILE):
        # Before the stages say it: requests may come first, and one with a token that the model
        # does not have would cost a stage.
        model = load_config(home, manifest.config_hash)
        tokenizer.check_vocabulary(model.vocab_size)
    config = GatewayConfig(
        served_model_name=flags.served_model_name or manifest.model_name,
        chat_template=ChatTemplate.load(home),
        eos_token_ids=end_tokens(manifest, tokenizer),
        host=flags.host,
        port=flags.port,
        api_keys=load_api_keys(flags.api_key_file) if flags.api_key_file else frozenset(),
        tls=load_tls(flags.tls_cert, flags.tls_key),
        limits=flags.limits,
    )
    source = ManifestSource(manifest, flags.manifest, flags.model_dir, home)
    access = PipelineAccess.create(source, pipeline_flags, limits, is_resumable=True)
    budget = privacy_budget(manifest, pipeline_flags.dp_epsilon, pipeline_flags.dp_delta)
    if budget is not None:
        logger.info("event=privacy_budget detail=%r", budget.describe(budget.max_rows))
    engine = PipelineEngine(limits, budget, flags.prefixes)
    standing: Pipeline | None = None
    overview = Overview(
        manifest,
        limits,
        lambda: engine.stats,
        lambda: standing.stages if standing else (),
    )
    stego: StegoService | None = None
    registry = CollectorRegistry()
    book = None if flags.secret_file is None else session_book(flags.secret_file, manifest)
    sessions = None if book is None else book.open
    desk = Desk(config, engine, tokenizer, GatewayMetrics(registry), sessions)

    async def run() -> None:
        # First of all: loading takes its time, and an address that cannot be had is known at once.
        listeners = await listen(config)
        url = ""

        async def work(pipeline: Pipeline) -> None:
            nonlocal standing, stego
            tokenizer.check_vocabulary(pipeline.vocab_size)
            if stego is None:
                stego = new_service(engine, tokenizer, manifest, home, pipeline)
            desk.open(pipeline.vocab_size)
            engine.allow_reuse(pipeline.is_row_exact)
            if standing is None:
                logger.info("event=serving url=%s model=%s", url, config.served_model_name)
            standing = pipeline
            await engine.run(pipeline)

        async with open_tasks() as tasks:
            url = await tasks.start(
                partial(
                    serve_http,
                    desk,
                    registry,
                    listeners=listeners,
                    overview=overview,
                    is_ready=lambda: standing is not None and standing.is_joined,
                    # Noise is another whenever a text is computed: nothing could be read from one.
                    more=stego_routes(desk, lambda: stego) if manifest.dp is None else (),
                )
            )
            try:
                await access.run(work, engine.scheduler)
            except PipelineError as error:
                engine.fail(SessionError(str(error)))
                desk.close()
                # Whoever waits for an answer gets one before the server goes.
                with trio.move_on_after(_LAST_ANSWER_SECONDS):
                    await desk.wait_idle()
                raise

    number = run_until_signalled(run)
    if number is not None:
        raise typer.Exit(0)


def _limits(flags: ServeFlags, manifest: Manifest) -> Limits:
    """What the stages are to have room for. Raises InputError."""
    check_context(flags.context, manifest)
    context = flags.context or manifest.activation_spec.max_seq_len
    return Limits(flags.max_batch, context, flags.chunk_tokens, len(manifest.stages))


def _allow_open_files(needed: int) -> None:
    """Have room for every connection: without, those above the limit wait unanswered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"this process may have {hard} open files and needs {needed}; "
            "lower --max-connections, or raise `ulimit -n`"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
