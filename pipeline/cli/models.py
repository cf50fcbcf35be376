"""The commands that fetch models, list them and remove them; and what takes them by name."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.error_reporting import new_app
from pipeline.cli.logs import tell
from pipeline.cli.progress import progress_bar
from pipeline.cli.terminal import write_text
from pipeline.errors import InputError

Name = Annotated[str, typer.Argument(metavar="REPO[@REVISION]", help="As `models` lists it.")]

app = new_app()


def pull_command(
    model: Annotated[
        str,
        typer.Argument(metavar="REPO[@REVISION]|PATH", help="Of the hub, or a directory here."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Write a directory [keep it by name]."),
    ] = None,
) -> None:
    """Fetch a model, to be named wherever a command takes --model-dir; prints its directory.

    From the Hugging Face hub into its cache (HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
    count), or from a directory, a copy of which is called by the directory's name. What was cut
    goes on where it was, and weights are held against the hub's checksums.

    \b
        pipeline-orch pull HuggingFaceTB/SmolLM2-135M-Instruct
        pipeline-orch plan --model-dir HuggingFaceTB/SmolLM2-135M-Instruct --stages 2
    """
    from pipeline.planning.pull import copy_model, pull
    from pipeline.planning.pulled_models import parse_name

    directory = Path(model)
    if not directory.is_dir():
        name = parse_name(model)
        if name is None:
            raise InputError(f"{model}: no directory, and no name as OWNER/MODEL[@REVISION]")
        if not sys.stderr.isatty():
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()  # the hub's own, which would fill a log
        with progress_bar("checking weights") as progress:
            directory = pull(name, progress)
    elif out is None:
        with progress_bar("copying") as progress:
            directory = copy_model(directory, progress=progress)
    if out is not None:
        with progress_bar("copying") as progress:
            directory = copy_model(directory, out, progress)
    tell("pipeline-orch", f"{model} is ready")
    write_text(f"{directory}\n")


@app.callback(invoke_without_command=True)
def list_command(ctx: typer.Context) -> None:
    """List the models that are here: name, size, directory. Below it, `remove` deletes one."""
    from pipeline.planning.pulled_models import pulled_models

    if ctx.invoked_subcommand is None:
        for each in pulled_models():
            write_text(f"{each.name}\t{each.num_bytes / 1e6:.0f} MB\t{each.directory}\n")


@app.command("remove")
def remove_command(name: Name) -> None:
    """Remove a model: a copy, or what the hub's cache has of it, which other programs share."""
    from pipeline.planning.pulled_models import parse_name, remove_model

    found = parse_name(name)
    if found is None:
        raise InputError(f"{name} is no model's name; pipeline-orch models lists them")
    remove_model(found)
    tell("pipeline-orch", f"removed {name}")
