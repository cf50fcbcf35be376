"""The commands of `pipeline-orch stego`: messages in generated text."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.error_reporting import new_app
from pipeline.cli.pipeline_flags import takes_flags
from pipeline.cli.stego_flags import Settings, TripFlags, settings_flags, trip_flags
from pipeline.errors import InputError

app = new_app()


@app.callback()
def stego() -> None:
    """Hide messages in text that is distributed as the model's own, and read them again."""


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
