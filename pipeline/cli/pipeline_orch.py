"""The `pipeline-orch` command: the user's side of a pipeline."""

import sys
from collections.abc import Sequence

import typer

from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.generate import generate
from pipeline.cli.generate_flags import GenerateFlags
from pipeline.cli.logs import configure_logging
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.settings import for_these, takes_flags

# What `other_commands` adds. They are imported where one is named, or all are to be listed.
OTHERS = (
    "attest", "chat", "join", "keygen", "leakage", "masks", "models", "parts", "place", "plan",
    "pull", "push", "serve", "session", "shard", "stego", "top",
)  # fmt: skip


@takes_flags(flags=GenerateFlags, shared=PipelineFlags)
def generate_command(ctx: typer.Context, flags: GenerateFlags, shared: PipelineFlags) -> None:
    """Generate text over the stages of a manifest, from the user's machine.

    Verifies what every stage runs, then sends the prompt and streams the text. stdout holds the
    prompt and its continuation, stderr everything else. A terminal is shown control characters as
    their escapes; pipes and files get them as they are.

    Example, with the stages of manifests/smollm2_2stage.json running:

    \b
        pipeline-orch --manifest manifests/smollm2_2stage.json \\
                      --tokenizer models/smollm2/tokenizer.json \\
                      --text "The capital of France is" --dev
    """
    del ctx  # no command below is meant, or this would not be called
    configure_logging(
        verbose=flags.verbose,
        log_format=shared.log_format,
        marks=shared.development.marks,
    )
    generate(flags, shared)


def may_name_another(arguments: Sequence[str]) -> bool:
    """Whether these may be more than the flags of generating."""
    begins_with_flag = bool(arguments) and arguments[0].startswith("--")
    return not begins_with_flag or not {"--help", "-h", *OTHERS}.isdisjoint(arguments)


def command_line(arguments: Sequence[str]) -> typer.Typer:
    """All commands that these may name."""
    app = new_app()
    app.callback(invoke_without_command=True)(for_these(arguments, generate_command))
    if may_name_another(arguments):
        from pipeline.cli.other_commands import add_commands

        add_commands(app)
    return app


def main() -> None:
    """Console entry point."""
    run_app(command_line(sys.argv[1:]), "pipeline-orch")
