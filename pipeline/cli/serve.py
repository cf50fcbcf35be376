"""Serving: an OpenAI-compatible API on the user's machine, in front of pipelines."""

import logging
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import typer
from prometheus_client import CollectorRegistry

from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.cli.kept_sessions import session_book
from pipeline.cli.pipeline_access import (
    ManifestSource,
    PipelineAccess,
    end_tokens,
    longest_text,
)
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.privacy_bound import privacy_budget
from pipeline.cli.replica import Replica, run_all
from pipeline.cli.serve_flags import ServeFlags
from pipeline.cli.service import Service
from pipeline.cli.service_manager import ServiceManager
from pipeline.cli.shard_directories import client_dir, model_or_parts
from pipeline.cli.signals import run_until_signalled
from pipeline.cli.stego_model import new_service
from pipeline.codecs.privacy_budget import PrivacyBudget
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.engine.replicas import Replicas
from pipeline.errors import InputError, PipelineError, SessionError
from pipeline.gateway.auth import load_api_keys
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.desk import Desk
from pipeline.gateway.http.page import page_routes
from pipeline.gateway.http.server import listen
from pipeline.gateway.http.server import serve as serve_http
from pipeline.gateway.http.stego import stego_routes
from pipeline.gateway.http.tls import load_tls
from pipeline.gateway.metrics import GatewayMetrics
from pipeline.gateway.pipeline_status import Overview
from pipeline.gateway.sampling_defaults import OPENAI, load_sampling_defaults
from pipeline.gateway.settings import GatewayConfig
from pipeline.gateway.templates import ChatTemplate
from pipeline.gateway.tool_families import family_of
from pipeline.gguf.model_files import has_model_file
from pipeline.models.config import CONFIG_FILE, load_config
from pipeline.orchestrator.open_pipeline import Pipeline
from pipeline.protocol.tide_window import TideWindow
from pipeline.sessions.session_book import HomeSession
from pipeline.stego.service import StegoService
from pipeline.tasks import open_tasks

logger = logging.getLogger(__name__)

# Open files beside clients' connections: stages, workers, listeners, libraries.
_OTHER_FILES = 128


def serve(flags: ServeFlags, pipeline_flags: PipelineFlags) -> None:
    """Serve until stopped. Raises PipelineError, or typer.Exit after a signal."""
    _allow_open_files(flags.limits.max_connections + _OTHER_FILES)
    manifest, window = load_manifest(flags.manifest), pipeline_flags.tide_window
    limits = _limits(flags, manifest, window)
    home = client_dir(model_or_parts(flags.model_dir, flags.manifest, "--model-dir"))
    tokenizer = GatewayTokenizer(home / "tokenizer.json")
    if has_model_file(home / CONFIG_FILE):
        # Before the stages say it: requests may come first, and one with a token that the model
        # does not have would cost a stage.
        tokenizer.check_vocabulary(load_config(home, manifest.config_hash).vocab_size)
    config = _config(flags, pipeline_flags.request_timeout, manifest, home, tokenizer, limits)
    source = ManifestSource(manifest, flags.manifest, flags.model_dir, home)
    accesses = PipelineAccess.replicas(source, pipeline_flags, limits, flags.replicas)
    budget = privacy_budget(manifest, pipeline_flags.dp_epsilon, pipeline_flags.dp_delta)
    replicas = _replicas(len(accesses), limits, budget, flags.prefixes)
    engine = Replicas(replicas)
    registry = CollectorRegistry()
    sessions = _sessions(flags, manifest, window)
    desk = Desk(config, engine, tokenizer, GatewayMetrics(registry), sessions)
    service = Service(desk, replicas)
    overview = Overview(
        manifest,
        limits,
        replicas,
        ignores_measurements=pipeline_flags.development.ignore_measurements,
    )
    stego: StegoService | None = None
    manager = ServiceManager()

    async def run() -> None:
        # First of all: loading takes its time, and an address that cannot be had is known at once.
        listeners = await listen(config)
        url = ""

        async def work(replica: Replica, pipeline: Pipeline) -> None:
            nonlocal stego
            tokenizer.check_vocabulary(pipeline.vocab_size)
            if stego is None:
                stego = new_service(engine, tokenizer, manifest, home, pipeline, window)
                logger.info("event=serving url=%s model=%s", url, config.served_model_name)
            replica.engine.allow_reuse(pipeline.is_row_exact)
            overview.specs = pipeline.manifest.stages
            replica.open()
            await replica.engine.run(pipeline)

        async with open_tasks() as tasks:
            tasks.start_soon(manager.keep_informed, lambda: service.readiness().is_ready)
            url = await tasks.start(
                partial(
                    serve_http,
                    desk,
                    registry,
                    listeners=listeners,
                    overview=overview,
                    readiness=service.readiness,
                    # Noise is another whenever a text is computed: nothing could be read from one.
                    more=stego_routes(desk, lambda: stego) if manifest.dp is None else (),
                    page=() if flags.no_page else page_routes(),
                )
            )
            tasks.start_soon(service.renew_when_told, engine.wait_idle)
            try:
                await run_all(replicas, accesses, work, outlasts=not flags.exit_on_loss)
            except PipelineError as error:
                await service.fail(SessionError(str(error)))
                raise

    async def leave() -> None:
        manager.stopping()
        await service.leave(flags.grace)

    number = run_until_signalled(run, leave)
    if number is not None:
        raise typer.Exit(0)


def _replicas(
    count: int, limits: Limits, budget: PrivacyBudget | None, prefixes: PrefixOptions
) -> Sequence[Replica]:
    """Pipelines to be, each with an engine before it."""
    if budget is not None:
        logger.info("event=privacy_budget detail=%r", budget.describe(budget.max_rows))
    return [Replica(idx, PipelineEngine(limits, budget, prefixes)) for idx in range(count)]


def _config(
    flags: ServeFlags,
    request_seconds: float | None,
    manifest: Manifest,
    home: Path,
    tokenizer: GatewayTokenizer,
    limits: Limits,
) -> GatewayConfig:
    """What clients meet. Raises InputError."""
    template = ChatTemplate.load(home)
    return GatewayConfig(
        served_model_name=flags.served_model_name or manifest.model_name,
        chat_template=template,
        tool_family=family_of(template.source, flags.tool_parser),
        sampling_defaults=(
            load_sampling_defaults(home) if flags.sampling_defaults == "model" else OPENAI
        ),
        cors_origins=flags.cors_origin,
        eos_token_ids=end_tokens(manifest, tokenizer),
        host=flags.host,
        port=flags.port,
        api_keys=load_api_keys(flags.api_key_file) if flags.api_key_file else frozenset(),
        tls=load_tls(flags.tls_cert, flags.tls_key),
        limits=replace(flags.limits, request_seconds=request_seconds),
        # Under a window a text need not end by itself before very long.
        default_max_tokens=min(limits.max_seq_len, manifest.activation_spec.max_seq_len),
        samples_at_home=flags.sample_at == "home",
    )


def _sessions(
    flags: ServeFlags, manifest: Manifest, window: TideWindow | None
) -> Callable[[str, str], HomeSession] | None:
    """What opens sessions that outlive their requests. Raises InputError."""
    if flags.secret_file is None:
        return None
    return session_book(flags.secret_file, manifest, window).open


def _limits(flags: ServeFlags, manifest: Manifest, window: TideWindow | None) -> Limits:
    """What the stages are to have room for. Raises InputError."""
    longest = longest_text(flags.context, manifest, window)
    context = flags.context or longest
    return Limits(
        flags.max_batch,
        context,
        flags.chunk_tokens,
        len(manifest.stages),
        window,
        max_gap=flags.max_gap,
        is_length_asked=flags.context is not None,
    )


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
