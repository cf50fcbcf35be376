"""The `pipeline-orch` command: the user's side of a pipeline."""

import sys
from pathlib import Path
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
    to_endpoint,
)
from pipeline.cli.connection import ConnectionFlags
from pipeline.cli.generate import GenerateFlags, generate
from pipeline.errors import InputError
from pipeline.files import check_writable, write_atomically
from pipeline.manifest import dump_manifest, load_manifest
from pipeline.trust import create_identity

DataOutOption = Annotated[
    str | None,
    typer.Option(metavar="ADDR", help="Where the last stage delivers [last stage's data_out]."),
]
ConnectOption = Annotated[
    float, typer.Option(min=0.1, metavar="SECONDS", help="Patience with stages not up.")
]
IdentityOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="This orchestrator's key (see keygen).")
]
SuperviseOption = Annotated[
    bool, typer.Option("--supervise", help="Start the workers here, and survive their death.")
]
ThreadsOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Threads of each worker, with --supervise.")
]
HangOption = Annotated[
    float, typer.Option(min=0.5, metavar="SECONDS", help="Patience with a silent stage.")
]

app = new_app()
app.add_typer(attest.app, name="attest")


@app.callback(invoke_without_command=True)
def generate_command(
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
    data_out_listen: DataOutOption = None,
    latency_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write per-token latencies as JSON.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")
    ] = False,
    connect_timeout: ConnectOption = 30.0,
    identity: IdentityOption = None,
    supervise: SuperviseOption = False,
    model_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The workers' model, with --supervise.")
    ] = None,
    threads: ThreadsOption = 1,
    hang_timeout: HangOption = 60.0,
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
    given = {"--manifest": manifest, "--tokenizer": tokenizer, "--text": text}
    if manifest is None or tokenizer is None or text is None:
        missing = [name for name, value in given.items() if value is None]
        raise InputError(f"missing {', '.join(missing)}; see pipeline-orch --help")
    generate(
        GenerateFlags(tokenizer, text, max_tokens, ignore_eos, latency_out),
        ConnectionFlags(
            manifest_path=manifest,
            identity=identity,
            is_dev=dev,
            data_out_listen=to_endpoint(data_out_listen, "--data-out-listen"),
            connect_seconds=connect_timeout,
            hang_seconds=hang_timeout,
            supervise=supervise,
            model_dir=model_dir,
            threads=threads,
        ),
    )


@app.command("serve")
def serve_command(
    manifest: ManifestOption,
    model_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Tokenizer and chat template; weights: --supervise.")
    ],
    host: Annotated[str, typer.Option(help="Where to listen; beyond loopback needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="HTTP port.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Accepted bearer keys, one a line.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name clients use [manifest's].")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, max=1024, metavar="N", help="Requests served at once.")
    ] = 16,
    chunk_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompt tokens in one step at most.")
    ] = 128,
    context: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Tokens of a request [the model's].")
    ] = None,
    data_out_listen: DataOutOption = None,
    connect_timeout: ConnectOption = 30.0,
    identity: IdentityOption = None,
    supervise: SuperviseOption = False,
    threads: ThreadsOption = 1,
    hang_timeout: HangOption = 60.0,
    dev: DevOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve an OpenAI-compatible API. It runs on the user's side: prompts are in the clear here.

    Many requests share the pipeline, joining and leaving at every step. When a stage dies the
    pipeline is reopened and every request goes on with the tokens it has.

    \b
        pipeline-orch serve --manifest manifests/smollm2_2stage.json \\
                            --model-dir models/smollm2 --supervise --dev
    """
    from pipeline.cli.serve import ServeFlags, serve

    configure_logging(verbose=verbose)
    serve(
        ServeFlags(host, port, api_key_file, served_model_name, max_batch, chunk_tokens, context),
        ConnectionFlags(
            manifest_path=manifest,
            identity=identity,
            is_dev=dev,
            data_out_listen=to_endpoint(data_out_listen, "--data-out-listen"),
            connect_seconds=connect_timeout,
            hang_seconds=hang_timeout,
            supervise=supervise,
            model_dir=model_dir,
            threads=threads,
        ),
    )


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
    if output is not None:
        check_writable(output)  # before minutes of hashing
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


def main() -> None:
    """Console entry point."""
    run_app(app, "pipeline-orch")
