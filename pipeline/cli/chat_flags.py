"""The flags of talking in a terminal."""

from typing import Annotated

from pipeline.cli.model_directory import ModelDir
from pipeline.cli.sampling_flags import SamplingFlags
from pipeline.cli.settings import Count, Flag, Settings
from pipeline.cli.shared_options import MAX_CONTEXT_VARIABLE, Context, ManifestFlag, VerboseFlag


class ChatFlags(Settings):
    """With which model, told what, and how it chooses its words."""

    manifest: ManifestFlag
    model_dir: Annotated[
        ModelDir | None,
        Flag(
            "DIR|NAME",
            "Tokenizer and chat template; weights: --supervise [what `join` has laid out].",
        ),
    ] = None
    system: Annotated[
        str | None, Flag("TEXT", "What the model is told before all else.", is_by_hand=True)
    ] = None
    max_tokens: Annotated[Count | None, Flag("N", "Tokens of an answer [what fits].")] = None
    context: Annotated[
        Context | None,
        Flag("N", "Tokens of the conversation [the model's].", older=(MAX_CONTEXT_VARIABLE,)),
    ] = None
    sampling: SamplingFlags
    verbose: VerboseFlag = False
