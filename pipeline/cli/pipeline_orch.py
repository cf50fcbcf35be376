"""The `pipeline-orch` command: the user's side of a pipeline."""

import typer

from pipeline.cli import attest, masks_command, preparation, session_command, stego
from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.generate import generate
from pipeline.cli.generate_flags import GenerateFlags
from pipeline.cli.leakage import leakage_command
from pipeline.cli.logs import configure_logging
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.serve_flags import ServeFlags
from pipeline.cli.settings import takes_flags
from pipeline.cli.top_flags import TopFlags

app = new_app()
app.add_typer(attest.app, name="attest")
app.command("leakage")(leakage_command)
app.add_typer(masks_command.app, name="masks")
app.add_typer(session_command.app, name="session")
app.add_typer(stego.app, name="stego")
for name, command in preparation.COMMANDS.items():
    app.command(name)(command)


@app.callback(invoke_without_command=True)
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
    configure_logging(verbose=flags.verbose, log_format=shared.log_format)
    generate(flags, shared)


@app.command("serve")
@takes_flags(flags=ServeFlags, shared=PipelineFlags)
def serve_command(flags: ServeFlags, shared: PipelineFlags) -> None:
    """Serve an OpenAI-compatible API. It runs on the user's side: prompts are in the clear here.

    Many requests share the pipeline, joining and leaving at every step. When a stage dies
    only that one is replaced, and every request goes on where it was.

    \b
        pipeline-orch serve --manifest manifests/smollm2_2stage.json \\
                            --model-dir models/smollm2 --supervise --dev
    """
    from pipeline.cli.serve import serve

    configure_logging(verbose=flags.verbose, log_format=shared.log_format)
    serve(flags, shared)


@app.command("top")
@takes_flags(flags=TopFlags)
def top_command(flags: TopFlags) -> None:
    """Watch a running server: every stage's load, batch, KV, time per step, attestation.

    load is the share of time spent computing; ms/step the mean of what one step takes, by part:
    computing, cryptography, socket calls. `q` or Ctrl-C ends it.
    """
    from pipeline.cli.top import ServerAddress, top

    address = ServerAddress.parse(flags.url, flags.api_key_file)
    top(address, flags.interval, once=flags.once)


def main() -> None:
    """Console entry point."""
    run_app(app, "pipeline-orch")
