"""The `pipeline-orch` command: the user's side of a pipeline."""

import logging
import os
import sys
from pathlib import Path
from time import perf_counter_ns
from typing import Annotated

import typer

from pipeline.cli import attest
from pipeline.cli.common import (
    DevOption,
    ManifestOption,
    VerboseOption,
    configure_logging,
    new_app,
    run_app,
    run_until_signalled,
    to_endpoint,
)
from pipeline.drive import drive
from pipeline.engine.latency import LatencyLog
from pipeline.engine.request import Request, TokenEvent
from pipeline.engine.scheduler import Limits, Scheduler
from pipeline.engine.tokenizer import TextStream, Tokenizer
from pipeline.errors import InputError
from pipeline.files import write_atomically
from pipeline.manifest import Manifest, dump_manifest, load_manifest
from pipeline.messages import Done, StageTiming, Start
from pipeline.orchestrator import Pipeline, PipelineOptions, open_pipeline
from pipeline.trust import DEV_WARNING, DevTrust, Trust, UserTrust, create_identity
from transport.attestation.dev import default_directory

logger = logging.getLogger(__name__)

app = new_app()
app.add_typer(attest.app, name="attest")


@app.callback(invoke_without_command=True)
def generate(
    ctx: typer.Context,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Manifest all parties share (JSON).")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The model's tokenizer.json.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt.")] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate at most.")
    ] = 20,
    data_out_listen: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Where the last stage delivers [last stage's data_out]."),
    ] = None,
    latency_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write per-token latencies as JSON.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")
    ] = False,
    connect_timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Patience with stages not yet up.")
    ] = 30.0,
    identity: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="This orchestrator's key (see keygen)."),
    ] = None,
    dev: DevOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Generate text over the stages of a manifest, from the user's machine.

    Verifies what every stage runs, then sends the prompt and streams the text. stdout holds the
    prompt and its continuation, stderr everything else.

    Example, with the stages of manifests/smollm2_2stage.json running:

    \b
        pipeline-orch --manifest manifests/smollm2_2stage.json \\
                      --tokenizer models/smollm2/tokenizer.json \\
                      --text "The capital of France is" --dev
    """
    if ctx.invoked_subcommand is not None:
        return
    configure_logging(verbose=verbose)
    if manifest is None or tokenizer is None or text is None:
        missing = [
            name
            for name, value in (
                ("--manifest", manifest),
                ("--tokenizer", tokenizer),
                ("--text", text),
            )
            if value is None
        ]
        raise InputError(f"missing {', '.join(missing)}; see pipeline-orch --help")
    loaded = load_manifest(manifest)
    words = Tokenizer(tokenizer)
    limits = Limits(num_slots=1, max_seq_len=loaded.activation_spec.max_seq_len)
    eos = frozenset() if ignore_eos else frozenset(loaded.eos_token_ids)
    request = Request(0, words.encode(text), max_tokens, eos)
    scheduler = Scheduler(limits)
    scheduler.submit(request)
    options = PipelineOptions(
        limits, connect_timeout, to_endpoint(data_out_listen, "--data-out-listen")
    )
    if latency_out is not None and not latency_out.resolve().parent.is_dir():
        raise InputError(f"--latency-out: there is no directory {latency_out.resolve().parent}")
    trust = _trust(loaded, identity, dev=dev)
    log = LatencyLog()
    printer = _Printer(text, TextStream(words, request.prompt_ids), log)

    async def run() -> None:
        async with open_pipeline(loaded, trust, options, _progress) as pipeline:
            await _generate(pipeline, scheduler, request, printer)

    number = run_until_signalled(run)
    if number is not None:
        raise typer.Exit(128 + number)
    print(f"latency: {log.summary()}", file=sys.stderr)
    if latency_out is not None:
        log.write(latency_out)


class _Printer:
    """Streams text to stdout and latencies to the log."""

    def __init__(self, prompt: str, stream: TextStream, log: LatencyLog) -> None:
        self._prompt = prompt
        self._stream = stream
        self._log = log
        self._last_ns = 0

    def start(self) -> None:
        """Print the prompt; time starts now."""
        self._write(self._prompt)
        self._last_ns = perf_counter_ns()

    def on_token(self, event: TokenEvent, timings: tuple[StageTiming, ...]) -> None:
        """Print one token's text."""
        now = perf_counter_ns()
        elapsed_ns, self._last_ns = now - self._last_ns, now
        self._log.add(event.token_id, elapsed_ns, timings)
        logger.debug("event=token n=%d ms=%.2f", len(self._log.token_ids), elapsed_ns / 1e6)
        self._write(self._stream.push(event.token_id))

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        self._write(self._stream.finish() + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()


async def _generate(
    pipeline: Pipeline, scheduler: Scheduler, request: Request, printer: _Printer
) -> None:
    for ready in pipeline.ready:
        logger.debug(
            "event=stage_ready stage=%d weight_bytes=%d kv_bytes=%d precision=%s threads=%d",
            ready.stage_idx,
            ready.weight_bytes,
            ready.kv_bytes,
            ready.precision,
            ready.num_threads,
        )
    await pipeline.notify(Start(request_id=request.request_id, slot=0))
    printer.start()
    await drive(pipeline, scheduler, printer.on_token)
    printer.finish()
    await pipeline.notify(Done(request_id=request.request_id))


@app.command("plan")
def plan_command(
    model_dir: Annotated[Path, typer.Option(metavar="DIR", help="config.json and weights.")],
    stages: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="How many stages.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write [stdout].")
    ] = None,
    host: Annotated[str, typer.Option(help="Host of every address.")] = "127.0.0.1",
    base_port: Annotated[
        int,
        typer.Option(
            min=1, max=65535, metavar="PORT", help="First port; stage i uses base + 10 i."
        ),
    ] = 9000,
    orchestrator_key: Annotated[
        list[str] | None, typer.Option(metavar="HEX", help="Public key allowed to connect.")
    ] = None,
    vsock: Annotated[
        bool, typer.Option("--vsock", help="Stages in Nitro enclaves; --host is their parent.")
    ] = False,
) -> None:
    """Write a manifest: layers split by measured bytes, weights and config pinned by hash."""
    from pipeline.plan import PlanOptions, plan

    options = PlanOptions(stages, host, base_port, tuple(orchestrator_key or ()), in_enclaves=vsock)
    text = dump_manifest(plan(model_dir, options))
    if output is None:
        sys.stdout.write(text)
        return
    write_atomically(output, text)
    print(f"wrote {output}", file=sys.stderr)


@app.command("shard")
def shard_command(
    manifest: ManifestOption,
    model_dir: Annotated[Path, typer.Option(metavar="DIR", help="The whole model.")],
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", metavar="DIR", help="A new directory.")
    ],
    stage: Annotated[
        int | None, typer.Option(metavar="I", help="One stage only, of a manifest of shards.")
    ] = None,
) -> None:
    """Cut a model into one directory per stage, so that a stage's machine needs only its own.

    Without --stage writes DIR/stageI for every stage and DIR/manifest.json, which pins the
    shards by hash. A stage's directory is a model directory for `stage-worker` and the input of
    `python -m enclave build`.
    """
    from pipeline.shard import cut_model, cut_stage

    loaded = load_manifest(manifest)
    if stage is None:
        cut_model(loaded, model_dir, output)
    else:
        cut_stage(loaded, stage, model_dir, output)
    print(f"wrote {output}", file=sys.stderr)


@app.command("keygen")
def keygen_command(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the private key.")],
) -> None:
    """Make this orchestrator's key; prints the public key for the manifest's orchestrator_keys."""
    print(create_identity(path))


def _trust(manifest: Manifest, identity: Path | None, *, dev: bool) -> Trust:
    if dev:
        logger.warning(DEV_WARNING)
        return DevTrust.create(manifest, default_directory(os.environ))
    return UserTrust.create(manifest, identity)


def _progress(line: str) -> None:
    print(f"pipeline-orch: {line}", file=sys.stderr)


def main() -> None:
    """Console entry point."""
    run_app(app, "pipeline-orch")
