"""The commands of `pipeline-orch stego`: messages in generated text."""

from pipeline.cli.error_reporting import new_app
from pipeline.cli.logs import configure_logging
from pipeline.cli.settings import takes_flags
from pipeline.cli.stego_flags import DecodeFlags, EncodeFlags, KeygenFlags, TripFlags
from pipeline.errors import InputError

app = new_app()


@app.callback()
def stego() -> None:
    """Hide messages in text that is distributed as the model's own, and read them again."""


@app.command("keygen")
@takes_flags(flags=KeygenFlags)
def keygen_command(flags: KeygenFlags) -> None:
    """Make a secret, and beside it a fingerprint: what both ends have to agree on.

    Give both files to whoever shall read. The fingerprint is not secret. Its settings are those
    that `encode` and `decode` use unless told otherwise, and where no message can be read, the
    error names what differs from it.
    """
    from pipeline.cli.stego_trip import keygen

    if (flags.manifest is None) != (flags.model_dir is None):
        raise InputError("--manifest and --model-dir belong together; give both, or neither")
    keygen(flags.out, flags.carrier, flags.manifest, flags.model_dir)


@app.command("encode")
@takes_flags(flags=EncodeFlags)
def encode_command(flags: EncodeFlags) -> None:
    """Write a text that carries a message and reads as the model's own.

    The text goes to stdout, what it took to stderr. It is read back before it is handed out.

    \b
        pipeline-orch stego encode --manifest manifests/smollm2_2stage.json --supervise --dev \\
            --model-dir models/smollm2 --prompt "My favourite season is" \\
            --secret-file secret --in message.txt --out letter.txt
    """
    from pipeline.cli.stego_trip import Outputs, encode, read_message

    _begin(flags.trip)
    data = read_message(flags.message, flags.source)
    outputs = Outputs(flags.out, flags.stats_out)
    encode(flags.trip, data, outputs, compresses=not flags.no_compress)


@app.command("decode")
@takes_flags(flags=DecodeFlags)
def decode_command(flags: DecodeFlags) -> None:
    """Read the message of a text: that and nothing else goes to stdout, byte for byte.

    Prompt, settings, model and kernels have to be those that the text was written with; the
    number of stages, threads and machines may be others. A terminal is shown control characters
    as their escapes.
    """
    from pipeline.cli.stego_trip import decode, read_text

    _begin(flags.trip)
    decode(flags.trip, read_text(flags.source))


def _begin(flags: TripFlags) -> None:
    configure_logging(
        verbose=flags.verbose,
        log_format=flags.pipeline.log_format,
        marks=flags.pipeline.development.marks,
    )
    if flags.secret_file is None and flags.passphrase_file is None:
        raise InputError("the secret is missing; give --secret-file or --passphrase-file")
