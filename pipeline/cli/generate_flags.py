"""The flags of generating once."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import model_validator

from pipeline.cli.door import DoorFlags
from pipeline.cli.kept_sessions import SessionFlags
from pipeline.cli.model_directory import OptionalModelDir, TokenizerFile
from pipeline.cli.prompt_input import with_prompt
from pipeline.cli.sampling_flags import SampleAtFlag, SamplingFlags
from pipeline.cli.settings import Count, Flag, Settings
from pipeline.cli.shard_directories import client_dir, model_or_parts
from pipeline.cli.shared_options import ContextFlag, ManifestFlag, VerboseFlag


class GenerateFlags(Settings):
    """What to generate, with what, and what to write beside it."""

    manifest: ManifestFlag
    text: Annotated[str, Flag("TEXT", "The prompt.", is_by_hand=True)]
    text_file: Annotated[
        Path | None,
        Flag("FILE", "The prompt's file, - for stdin: unseen by `ps`.", is_by_hand=True),
    ] = None
    tokenizer: Annotated[
        TokenizerFile | None,
        Flag(
            "FILE|NAME",
            "The model's tokenizer.json, or a pulled model [--model-dir's, or `join`'s].",
        ),
    ] = None
    max_tokens: Annotated[Count, Flag("N", "Tokens to generate at most.")] = 20
    context: ContextFlag = None
    latency_out: Annotated[Path | None, Flag("FILE", "Write per-token latencies as JSON.")] = None
    ignore_eos: Annotated[bool, Flag(None, "Go on after the end-of-text token.")] = False
    model_dir: Annotated[
        OptionalModelDir, Flag("DIR|NAME", "The workers' model, with --supervise.")
    ] = None
    exit_on_loss: Annotated[bool, Flag(None, "End on a loss, with --supervise too.")] = False
    sampling: SamplingFlags
    sample_at: SampleAtFlag = "stage"
    kept: SessionFlags
    door: DoorFlags
    verbose: VerboseFlag = False

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that is given, or the model's, or `join`'s. Raises InputError."""
        if self.tokenizer is not None:
            return self.tokenizer
        model = model_or_parts(self.model_dir, self.manifest, "--tokenizer")
        return client_dir(model) / "tokenizer.json"

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_prompt(values, "text")
