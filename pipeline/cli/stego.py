"""The commands of `pipeline-orch stego`: messages in generated text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import ManifestOption, VerboseOption, finite, new_app
from pipeline.cli.logs import configure_logging
from pipeline.cli.pipeline_flags import PipelineFlags, pipeline_flags, takes_flags
from pipeline.cli.prompt_input import read_prompt
from pipeline.errors import InputError

app = new_app()

Settings = dict[str, str | int | float]


@app.callback()
def stego() -> None:
    """Hide messages in text that is distributed as the model's own, and read them again."""


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


@app.command("keygen")
@takes_flags(settings=settings_flags)
def keygen_command(
    settings: Settings,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="A new secret's file.")],
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The manifest that will be used.")
    ] = None,
    model_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The model that will be used.")
    ] = None,
) -> None:
    """Make a secret, and beside it a fingerprint: what both ends have to agree on.

    Give both files to whoever shall read. The fingerprint is not secret. Its settings are those
    that `encode` and `decode` use unless told otherwise, and where no message can be read, the
    error names what differs from it.
    """
    from pipeline.cli.stego_trip import keygen

    if (manifest is None) != (model_dir is None):
        raise InputError("--manifest and --model-dir belong together; give both, or neither")
    keygen(out, settings, manifest, model_dir)


@app.command("encode")
@takes_flags(flags=trip_flags)
def encode_command(
    flags: TripFlags,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to hide; `ps` shows it to others.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--in", metavar="FILE", help="What to hide [-, stdin].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The text's file [stdout].")
    ] = None,
    no_compress: Annotated[
        bool, typer.Option("--no-compress", help="Carry the message as it is.")
    ] = False,
    stats_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each token's bits as JSON.")
    ] = None,
) -> None:
    """Write a text that carries a message and reads as the model's own.

    The text goes to stdout, what it took to stderr. It is read back before it is handed out.

    \b
        pipeline-orch stego encode --manifest manifests/smollm2_2stage.json --supervise --dev \\
            --model-dir models/smollm2 --prompt "My favourite season is" \\
            --secret-file secret --in message.txt --out letter.txt
    """
    from pipeline.cli.stego_trip import Outputs, encode, read_message

    data = read_message(message, source)
    encode(flags, data, Outputs(out, stats_out), compresses=not no_compress)


@app.command("decode")
@takes_flags(flags=trip_flags)
def decode_command(
    flags: TripFlags,
    source: Annotated[Path, typer.Option("--in", metavar="FILE", help="The text [-, stdin].")] = (
        Path("-")
    ),
) -> None:
    """Read the message of a text: that and nothing else goes to stdout, byte for byte.

    Prompt, settings, model and kernels have to be those that the text was written with; the
    number of stages, threads and machines may be others. A terminal is shown control characters
    as their escapes.
    """
    from pipeline.cli.stego_trip import decode, read_text

    decode(flags, read_text(source))
