"""The `pipeline-orch masks` commands: what hides rows from a linear worker, made in advance."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.agreement.manifest import load_manifest
from pipeline.cli.error_reporting import new_app
from pipeline.cli.logs import tell
from pipeline.cli.progress import progress_bar
from pipeline.cli.shared_options import ManifestOption
from pipeline.errors import InputError
from pipeline.files import check_writable
from pipeline.kernels.runtime import set_num_threads

app = new_app()


@app.callback()
def masks() -> None:
    """Make what hides rows from a worker that multiplies them."""


@app.command("make")
def make_command(
    manifest: ManifestOption,
    model_dir: Annotated[Path, typer.Option(metavar="DIR", help="The whole model.")],
    tokens: Annotated[
        int, typer.Option(min=1, max=1 << 32, metavar="N", help="How many masks: one a token.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", metavar="FILE", help="A new file.")
    ],
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads to compute with [all CPUs].")
    ] = None,
) -> None:
    """Make masks for N tokens, of prompts and texts: `stage-worker --masks FILE` uses them.

    Each hides one token from the linear worker of a manifest, once. The file is as secret as the
    texts: keep it on the stage's machine, use no copy of it, and delete it when it is used up.

    \b
        pipeline-orch masks make --manifest manifest.json --model-dir models/smollm2 \\
                                 --tokens 1000 -o masks
    """
    from pipeline.offload.held_model import load_linears
    from pipeline.offload.mask_file import write_masks
    from pipeline.stage.model_config import agreed_config

    loaded = load_manifest(manifest)
    if loaded.part is None or loaded.part.kind != "linear":
        raise InputError(f"{manifest} has no worker that is sent masked rows; plan --linear")
    if output.exists():
        raise InputError(f"{output} exists, and masks are never written over others")
    check_writable(output)  # before minutes of computing
    set_num_threads(threads or len(os.sched_getaffinity(0)))
    config = agreed_config(loaded, model_dir)
    with progress_bar("loading weights") as progress:
        linears = load_linears(loaded, config, model_dir, progress)
    with progress_bar("making masks") as progress:
        write_masks(output, linears, loaded.stage(0).weight_hashes, tokens, progress)
    size = output.stat().st_size
    tell("pipeline-orch", f"wrote {output}: {tokens} masks, {size} bytes")
