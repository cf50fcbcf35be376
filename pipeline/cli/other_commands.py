"""The commands of `pipeline-orch` beside generating."""

import typer

from pipeline.cli import attest, preparation, session_command, stego
from pipeline.cli.leakage import leakage_command
from pipeline.cli.logs import configure_logging
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.serve_flags import ServeFlags
from pipeline.cli.settings import takes_flags
from pipeline.cli.top_flags import TopFlags


def add_commands(app: typer.Typer) -> None:
    """Give the application all of them."""
    app.add_typer(attest.app, name="attest")
    app.command("leakage")(leakage_command)
    app.add_typer(session_command.app, name="session")
    app.add_typer(stego.app, name="stego")
    for name, command in preparation.COMMANDS.items():
        app.command(name)(command)
    app.command("serve")(serve_command)
    app.command("top")(top_command)


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


@takes_flags(flags=TopFlags)
def top_command(flags: TopFlags) -> None:
    """Watch a running server: every stage's load, batch, KV, time per step, attestation.

    load is the share of time spent computing; ms/step the mean of what one step takes, by part:
    computing, cryptography, socket calls. `q` or Ctrl-C ends it.
    """
    from pipeline.cli.top import ServerAddress, top

    address = ServerAddress.parse(flags.url, flags.api_key_file)
    top(address, flags.interval, once=flags.once)
