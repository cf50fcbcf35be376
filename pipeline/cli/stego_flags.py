"""The flags that writing a text and reading it have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.logs import configure_logging
from pipeline.cli.pipeline_flags import PipelineFlags, pipeline_flags, takes_flags
from pipeline.cli.prompt_input import read_prompt
from pipeline.cli.shared_options import ManifestOption, VerboseOption, finite
from pipeline.errors import InputError

Settings = dict[str, str | int | float]


def settings_flags(
    codec: Annotated[
        str | None, typer.Option(metavar="NAME", help="How bits are carried: range, fimec [range].")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Draw from the K likeliest, 0: all [50].")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Of the draws [1].", callback=finite)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="From the likeliest that have P together [1].", callback=finite
        ),
    ] = None,
) -> Settings:
    """The settings that the command line gives."""
    given = {"codec": codec, "top_k": top_k, "temperature": temperature, "top_p": top_p}
    return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TripFlags:
    """What writing and reading have in common."""

    manifest: Path
    model_dir: Path
    prompt: str
    secret_file: Path | None
    passphrase_file: Path | None
    settings: Settings
    is_chat: bool
    context: int | None
    max_tokens: int | None
    pipeline: PipelineFlags


@takes_flags(settings=settings_flags, shared=pipeline_flags)
def trip_flags(
    settings: Settings,
    shared: PipelineFlags,
    manifest: ManifestOption,
    model_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Tokenizer; weights: --supervise.")
    ],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the text follows; no part of it.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The prompt's file: unseen by `ps`.")
    ] = None,
    secret_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What both ends have (`stego keygen`).")
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A passphrase, instead or as well.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, by the chat template.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Room for prompt and text [as needed].")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of the text at most [enough].")
    ] = None,
    verbose: VerboseOption = False,
) -> TripFlags:
    """Read what both commands are given. Raises InputError."""
    configure_logging(verbose=verbose, log_format=shared.log_format)
    text = read_prompt(prompt, prompt_file, "--prompt")
    if text is None:
        raise InputError("the prompt is missing; give --prompt or --prompt-file")
    if secret_file is None and passphrase_file is None:
        raise InputError("the secret is missing; give --secret-file or --passphrase-file")
    return TripFlags(
        manifest=manifest,
        model_dir=model_dir,
        prompt=text,
        secret_file=secret_file,
        passphrase_file=passphrase_file,
        settings=settings,
        is_chat=chat,
        context=context,
        max_tokens=max_tokens,
        pipeline=shared,
    )
