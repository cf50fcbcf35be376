"""The `pipeline-orch` command: the user's side of a pipeline."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.agreement.manifest import (
    check_precision,
    check_split,
    dump_manifest,
    load_manifest,
)
from pipeline.agreement.trust_policy import create_identity
from pipeline.cli import attest, session_command, stego
from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.generate import GenerateFlags, generate
from pipeline.cli.kv_store_flags import SecretOption
from pipeline.cli.leakage import leakage_command
from pipeline.cli.logs import configure_logging, tell
from pipeline.cli.pipeline_flags import PipelineFlags, pipeline_flags, takes_flags
from pipeline.cli.progress import progress_bar
from pipeline.cli.prompt_input import read_prompt
from pipeline.cli.sampling_flags import sampling_flags
from pipeline.cli.shared_options import ManifestOption, VerboseOption, finite
from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.errors import InputError
from pipeline.files import check_writable, write_atomically
from pipeline.gateway.rate_limits import GatewayLimits
from pipeline.sampling.params import SamplingParams

DEFAULT_LIMITS = GatewayLimits()
DTypeOption = Annotated[
    str | None,
    typer.Option(help="Weights of every stage: float32, bfloat16, int8 [manifest's]."),
]

OLDER_VARIABLES = {
    "--client-part": ("INFEMERAL_CLIENT_WEIGHTS_PATH",),
    "--served-model-name": ("INFEMERAL_CLIENT_MODEL_ID",),
    "--context": ("INFEMERAL_SERVER_MAX_CONTEXT_LENGTH",),
    "--dp-epsilon": ("INFEMERAL_CRYPTO_DP_EPSILON",),
    "--dp-delta": ("INFEMERAL_CRYPTO_DP_DELTA",),
}

app = new_app()
app.add_typer(attest.app, name="attest")
app.command("leakage")(leakage_command)
app.add_typer(session_command.app, name="session")
app.add_typer(stego.app, name="stego")


@app.callback(invoke_without_command=True)
@takes_flags(sampling=sampling_flags, shared=pipeline_flags)
def generate_command(
    ctx: typer.Context,
    sampling: SamplingParams,
    shared: PipelineFlags,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Manifest all parties share (JSON).")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The model's tokenizer.json.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt.")] = None,
    text_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The prompt's file, - for stdin: unseen by `ps`."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate at most.")
    ] = 20,
    context: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Room for prompt and text [as needed].")
    ] = None,
    latency_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write per-token latencies as JSON.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")
    ] = False,
    model_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The workers' model, with --supervise.")
    ] = None,
    session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on where this session ended.")
    ] = None,
    secret_file: SecretOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Generate text over the stages of a manifest, from the user's machine.

    Verifies what every stage runs, then sends the prompt and streams the text. stdout holds the
    prompt and its continuation, stderr everything else. A terminal is shown control characters as
    their escapes; pipes and files get them as they are.

    Example, with the stages of manifests/smollm2_2stage.json running:

    \b
        pipeline-orch --manifest manifests/smollm2_2stage.json \\
                      --tokenizer models/smollm2/tokenizer.json \\
                      --text "The capital of France is" --dev
    """
    if ctx.invoked_subcommand is not None:
        return
    configure_logging(verbose=verbose, log_format=shared.log_format)
    prompt = read_prompt(text, text_file)
    given = {"--manifest": manifest, "--tokenizer": tokenizer, "--text": prompt}
    if manifest is None or tokenizer is None or prompt is None:
        missing = [name for name, value in given.items() if value is None]
        raise InputError(f"missing {', '.join(missing)}; see pipeline-orch --help")
    generate(
        GenerateFlags(
            manifest=manifest,
            model_dir=model_dir,
            tokenizer=tokenizer,
            text=prompt,
            max_tokens=max_tokens,
            context=context,
            ignore_eos=ignore_eos,
            latency_out=latency_out,
            sampling=sampling,
            session=session,
            secret_file=secret_file,
        ),
        shared,
    )


@app.command("serve")
@takes_flags(shared=pipeline_flags)
def serve_command(
    shared: PipelineFlags,
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
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain (PEM), for HTTPS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM).")] = None,
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
    prefix_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            callback=finite,
            help="Share of KV memory that texts of ended requests may take; 0: none.",
        ),
    ] = 0.75,
    prefix_ttl: Annotated[
        float,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            callback=finite,
            help="How long they stay, for requests that go on from them.",
        ),
    ] = 600.0,
    secret_file: SecretOption = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of all clients together [no limit].")
    ] = None,
    max_connections: Annotated[
        int, typer.Option(min=1, metavar="N", help="Open connections at most.")
    ] = DEFAULT_LIMITS.max_connections,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Size of a request at most.")
    ] = DEFAULT_LIMITS.max_body_bytes,
    verbose: VerboseOption = False,
) -> None:
    """Serve an OpenAI-compatible API. It runs on the user's side: prompts are in the clear here.

    Many requests share the pipeline, joining and leaving at every step. When a stage dies
    only that one is replaced, and every request goes on where it was.

    \b
        pipeline-orch serve --manifest manifests/smollm2_2stage.json \\
                            --model-dir models/smollm2 --supervise --dev
    """
    from pipeline.cli.serve import ServeFlags, serve

    configure_logging(verbose=verbose, log_format=shared.log_format)
    serve(
        ServeFlags(
            manifest=manifest,
            model_dir=model_dir,
            host=host,
            port=port,
            api_key_file=api_key_file,
            served_model_name=served_model_name,
            max_batch=max_batch,
            chunk_tokens=chunk_tokens,
            context=context,
            tls_cert=tls_cert,
            tls_key=tls_key,
            prefixes=PrefixOptions(prefix_share, prefix_ttl),
            secret_file=secret_file,
            limits=GatewayLimits(
                max_connections=max_connections,
                max_body_bytes=max_body_bytes,
                requests_per_minute=requests_per_minute,
            ),
        ),
        shared,
    )


@app.command("top")
def top_command(
    url: Annotated[str, typer.Option(metavar="URL", help="The server.")] = "http://127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A key the server accepts.")
    ] = None,
    interval: Annotated[
        float,
        typer.Option(
            min=0.1, max=86400, metavar="SECONDS", help="Between two looks.", callback=finite
        ),
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot.")] = False,
) -> None:
    """Watch a running server: every stage's load, batch, KV, time per step, attestation.

    load is the share of time spent computing; ms/step the mean of what one step takes, by part:
    computing, cryptography, socket calls. `q` or Ctrl-C ends it.
    """
    from pipeline.cli.top import ServerAddress, top

    top(ServerAddress.parse(url, api_key_file), interval, once=once)


@app.command("plan")
def plan_command(
    model_dir: Annotated[Path, typer.Option(metavar="DIR", help="config.json and weights.")],
    stages: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="How many stages.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write [stdout].")
    ] = None,
    host: Annotated[
        list[str],
        typer.Option(
            metavar="HOST[,HOST...]",
            help="Host of every address, or each stage's in order and then, "
            "if it has its own, the orchestrator's; repeatable.",
        ),
    ] = ["127.0.0.1"],  # noqa: B006  (typer copies it)
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model [the directory's].")
    ] = None,
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
    wire_dtype: Annotated[
        str, typer.Option(help="Activations between stages: F32, F16, BF16, I8, I5 (rotated).")
    ] = "F32",
    dtype: DTypeOption = None,
    split: Annotated[
        str, typer.Option(help="Embedding and head: stages (first, last) or client (here).")
    ] = "stages",
    dp_sigma: Annotated[
        float | None,
        typer.Option(metavar="S", help="Noise on rows that leave here [none]; split client."),
    ] = None,
    dp_clip: Annotated[
        float | None, typer.Option(metavar="C", help="L2 norm they are clipped to before.")
    ] = None,
) -> None:
    """Write a manifest: layers split by measured bytes, weights and config pinned by hash."""
    from pipeline.planning.plan import PlanOptions, plan

    if (dp_sigma is None) != (dp_clip is None):
        raise InputError(
            "--dp-sigma and --dp-clip go together: noise protects rows of a bounded length"
        )
    options = PlanOptions(
        stages,
        tuple(name.strip() for names in host for name in names.split(",")),
        base_port,
        tuple(orchestrator_key or ()),
        in_enclaves=vsock,
        model_name=model_name,
        wire_dtype=wire_dtype,
        precision=None if dtype is None else check_precision(dtype),
        split=check_split(split),
        noise=None if dp_sigma is None or dp_clip is None else (dp_sigma, dp_clip),
    )
    if output is not None:
        check_writable(output)  # before minutes of hashing
    with progress_bar("hashing weights") as progress:
        text = dump_manifest(plan(model_dir, options, progress))
    if output is None:
        sys.stdout.write(text)
        return
    write_atomically(output, text)
    tell("pipeline-orch", f"wrote {output}")


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
    dtype: DTypeOption = None,
    client_file: Annotated[
        bool, typer.Option("--client-file", help="Client's part as one client_weights.safetensors.")
    ] = False,
    rotate_secret: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rotate by this secret, made if need be (split client)."),
    ] = None,
) -> None:
    """Cut a model into one directory per stage, so that a stage's machine needs only its own.

    Without --stage writes DIR/stageI for every stage and DIR/manifest.json, which pins the
    shards by hash, and with --dtype the precision they are stored and computed in. A stage's
    directory is a model directory for `stage-worker` and the input of `python -m enclave build`.
    With a split of client also DIR/client, embedding, final norm and head, for --client-part.

    --rotate-secret writes weights that compute in a basis of their own, so that rows travel
    rotated. DIR/client then tells what the secret is: keep both. Whoever has the model's plain
    weights finds the rotation in seconds; pipeline/codecs/README.md says what that leaves.
    """
    from pipeline.cli.rotation_secret import load_rotation
    from pipeline.planning.shard import cut_model, cut_stage

    loaded = load_manifest(manifest)
    precision = None if dtype is None else check_precision(dtype)
    if stage is not None and client_file:
        raise InputError("--client-file: with --stage no client's part is written")
    if stage is not None and precision is not None:
        raise InputError("--dtype: with --stage the manifest of the shards decides")
    rotation = None
    if rotate_secret is not None:
        width = loaded.activation_spec.hidden_dim
        rotation = load_rotation(rotate_secret, width, may_create=stage is None)
    with progress_bar("cutting weights") as progress:
        if stage is None:
            cut_model(
                loaded, model_dir, output, precision, progress,
                in_one_file=client_file, rotation=rotation,
            )  # fmt: skip
        else:
            cut_stage(loaded, stage, model_dir, output, progress, rotation)
    tell("pipeline-orch", f"wrote {output}")


@app.command("keygen")
def keygen_command(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the private key.")],
) -> None:
    """Make this orchestrator's key; prints the public key for the manifest's orchestrator_keys."""
    print(create_identity(path))


def main() -> None:
    """Console entry point."""
    run_app(app, "pipeline-orch", OLDER_VARIABLES)
