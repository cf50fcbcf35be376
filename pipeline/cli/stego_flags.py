"""The flags of messages in texts: of writing, of reading, and what those have in common."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import model_validator

from pipeline.cli.model_directory import ModelDir, OptionalModelDir
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.prompt_input import with_prompt
from pipeline.cli.settings import Count, Finite, Flag, Settings
from pipeline.cli.shared_options import ContextFlag, ManifestFlag, VerboseFlag


class CarrierFlags(Settings):
    """How bits are carried; None is what the secret's fingerprint says."""

    codec: Annotated[str | None, Flag("NAME", "How bits are carried: range, fimec [range].")] = None
    top_k: Annotated[int | None, Flag("K", "Draw from the K likeliest, 0: all [50].")] = None
    temperature: Annotated[Finite | None, Flag("T", "Of the draws [1].")] = None
    top_p: Annotated[Finite | None, Flag("P", "From the likeliest that have P together [1].")] = (
        None
    )


class TripFlags(Settings):
    """What writing and reading have in common."""

    carrier: CarrierFlags
    manifest: ManifestFlag
    model_dir: Annotated[ModelDir, Flag("DIR|NAME", "Tokenizer; weights: --supervise.")]
    prompt: Annotated[str, Flag("TEXT", "What the text follows; no part of it.", is_by_hand=True)]
    prompt_file: Annotated[
        Path | None, Flag("FILE", "The prompt's file: unseen by `ps`.", is_by_hand=True)
    ] = None
    secret_file: Annotated[Path | None, Flag("FILE", "What both ends have (`stego keygen`).")] = (
        None
    )
    passphrase_file: Annotated[Path | None, Flag("FILE", "A passphrase, instead or as well.")] = (
        None
    )
    chat: Annotated[bool, Flag(None, "The prompt is a message, by the chat template.")] = False
    context: ContextFlag = None
    max_tokens: Annotated[Count | None, Flag("N", "Tokens of the text at most [enough].")] = None
    pipeline: PipelineFlags
    verbose: VerboseFlag = False

    @model_validator(mode="before")
    @classmethod
    def _read_prompt(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_prompt(values, "prompt")


class KeygenFlags(Settings):
    """What a new secret is for."""

    carrier: CarrierFlags
    out: Annotated[Path, Flag("FILE", "A new secret's file.", ("--out", "-o"), is_by_hand=True)]
    manifest: Annotated[Path | None, Flag("FILE", "The manifest that will be used.")] = None
    model_dir: Annotated[OptionalModelDir, Flag("DIR|NAME", "The model that will be used.")] = None


class EncodeFlags(Settings):
    """What to hide, and where the text goes."""

    trip: TripFlags
    message: Annotated[
        str | None, Flag("TEXT", "What to hide; `ps` shows it to others.", is_by_hand=True)
    ] = None
    source: Annotated[
        Path | None, Flag("FILE", "What to hide [-, stdin].", ("--in",), is_by_hand=True)
    ] = None
    out: Annotated[
        Path | None, Flag("FILE", "The text's file [stdout].", ("--out", "-o"), is_by_hand=True)
    ] = None
    no_compress: Annotated[bool, Flag(None, "Carry the message as it is.")] = False
    stats_out: Annotated[
        Path | None, Flag("FILE", "Write each token's bits as JSON.", is_by_hand=True)
    ] = None


class DecodeFlags(Settings):
    """Where the text is."""

    trip: TripFlags
    source: Annotated[Path, Flag("FILE", "The text [-, stdin].", ("--in",), is_by_hand=True)] = (
        Path("-")
    )
