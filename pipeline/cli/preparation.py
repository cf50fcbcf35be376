"""The commands that write what a pipeline is made from: manifest, shards, keys."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from pipeline.agreement.identity import create_identity
from pipeline.agreement.manifest import (
    check_precision,
    check_split,
    dump_manifest,
    load_manifest,
)
from pipeline.cli.logs import tell
from pipeline.cli.model_directory import model_option
from pipeline.cli.planned_memory import machine_sizes, tell_memory
from pipeline.cli.progress import progress_bar
from pipeline.cli.shared_options import ManifestOption
from pipeline.errors import InputError
from pipeline.files import check_writable, write_atomically
from pipeline.units import GIB
from transport.dial_and_listen import Endpoint, parse_endpoint
from transport.errors import EndpointError


def plan_command(
    model_dir: Annotated[
        Path,
        typer.Option(
            metavar="DIR|NAME",
            callback=model_option,
            help="config.json and weights, or a GGUF file.",
        ),
    ],
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
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Weights of every stage: float32, bfloat16, int8, int4 [as its worker says]."
        ),
    ] = None,
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
    attention: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Untrusted worker that holds encoded keys and values."),
    ] = None,
    kv_noise: Annotated[
        float | None,
        typer.Option(metavar="SCALE", help="Noise on rows that lie encoded [none]."),
    ] = None,
    kv_decoys: Annotated[
        int | None,
        typer.Option(metavar="N", help="Rows of other text among them; with --attention [0]."),
    ] = None,
    one_time_keys: Annotated[
        bool, typer.Option("--one-time-keys", help="Other keys for each step's rows.")
    ] = False,
    home_layers: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST,LAST",
            help="Layers of a stage at each end that is at home; others keep rows encoded.",
        ),
    ] = None,
    linear: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Untrusted worker that multiplies rows under masks."),
    ] = None,
    mixed_linear: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Untrusted worker that multiplies prompts' mixed rows."),
    ] = None,
    part_key: Annotated[
        str | None, typer.Option(metavar="HEX", help="That worker's public key.")
    ] = None,
    stage_key: Annotated[
        list[str] | None,
        typer.Option(metavar="HEX", help="Public key of a stage on a machine of one's own."),
    ] = None,
    kv_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1 << 20,
            metavar="GIB",
            help="Of every stage, for keys and values [what is free there].",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="GIB[,GIB...]",
            help="Free memory of the stages' machines, to say what fits [this one's, where here].",
        ),
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
        part=_part(
            {"attention": attention, "linear": linear, "mixed-linear": mixed_linear}, part_key
        ),
        stage_keys=tuple(stage_key or ()),
        home_layers=None if home_layers is None else _home_layers(home_layers),
        encoding=_encoding(
            kv_noise, kv_decoys, is_one_time=one_time_keys, is_encoded=attention or home_layers
        ),
        kv_bytes=None if kv_memory is None else int(kv_memory * GIB),
    )
    sizes = None if memory is None else machine_sizes(memory, stages)
    if output is not None:
        check_writable(output)  # before minutes of hashing
    with progress_bar("hashing weights") as progress:
        manifest = plan(model_dir, options, progress)
    text = dump_manifest(manifest)
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_atomically(output, text)
    tell_memory(manifest, model_dir, sizes)
    if output is not None:
        tell("pipeline-orch", f"wrote {output}")


def _home_layers(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4}),(\d{1,4})", text)
    if match is None:
        raise InputError(f"--home-layers {text[:80]!r}: give two numbers, as in 1,1")
    return int(match[1]), int(match[2])


def _encoding(
    noise: float | None, num_decoys: int | None, *, is_one_time: bool, is_encoded: str | None
) -> dict[str, float]:
    """What is given of how rows are encoded. Raises InputError where none are."""
    given: dict[str, float | None] = {
        "noise": noise, "num_decoys": num_decoys, "is_one_time": is_one_time or None
    }  # fmt: skip
    found = {name: value for name, value in given.items() if value is not None}
    if found and is_encoded is None:
        raise InputError(
            "--kv-noise, --kv-decoys and --one-time-keys are for keys and values that lie encoded; "
            "say where by --attention or --home-layers"
        )
    return found


def _part(
    workers: Mapping[str, str | None], public_key: str | None
) -> tuple[str, Endpoint, str | None] | None:
    """What is asked for, of whom. Raises InputError."""
    given = [(kind, address) for kind, address in workers.items() if address is not None]
    if len(given) > 1:
        raise InputError(f"--{given[0][0]} and --{given[1][0]} are two modes; give one")
    for kind, address in given:
        try:
            return kind, parse_endpoint(address), public_key
        except EndpointError as error:
            raise InputError(f"--{kind}: {error}") from error
    if public_key is not None:
        raise InputError("--part-key is the key of a worker; say which, and where it is")
    return None


def shard_command(
    manifest: ManifestOption,
    model_dir: Annotated[
        Path, typer.Option(metavar="DIR|NAME", callback=model_option, help="The whole model.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", metavar="DIR", help="A new directory.")
    ],
    stage: Annotated[
        int | None, typer.Option(metavar="I", help="One stage only, of a manifest of shards.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Weights of every stage: float32, bfloat16, int8, int4 [manifest's]."),
    ] = None,
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
    shards by hash, and with --dtype the precision they are stored and computed in; beside them
    the tokenizer and what goes with it: DIR is a --model-dir for --supervise. A stage's
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


def keygen_command(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the private key.")],
) -> None:
    """Make this orchestrator's key; prints the public key for the manifest's orchestrator_keys."""
    print(create_identity(path))


COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan_command,
    "shard": shard_command,
    "keygen": keygen_command,
}
