"""The commands of `pipeline-orch` beside generating."""

from typing import Annotated

import typer

from pipeline.cli import (
    attest,
    masks_command,
    models,
    place_command,
    preparation,
    session_command,
    stego,
)
from pipeline.cli.chat_flags import ChatFlags
from pipeline.cli.cluster_flags import JoinFlags, PartsFlags, PushFlags
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
    app.add_typer(masks_command.app, name="masks")
    app.add_typer(models.app, name="models")
    app.add_typer(place_command.app, name="place")
    app.command("pull")(models.pull_command)
    app.add_typer(session_command.app, name="session")
    app.add_typer(stego.app, name="stego")
    for name, command in preparation.COMMANDS.items():
        app.command(name)(command)
    app.command("serve")(serve_command)
    app.command("chat")(chat_command)
    app.command("join")(join_command)
    app.command("push")(push_command)
    app.command("parts")(parts_command)
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

    configure_logging(
        verbose=flags.verbose,
        log_format=shared.log_format,
        marks=shared.development.marks,
    )
    serve(flags, shared)


@takes_flags(flags=JoinFlags)
def join_command(
    lines: Annotated[
        list[str] | None, typer.Argument(metavar="[LINE]...", help="Lines of `stage-worker offer`.")
    ] = None,
    *,
    flags: JoinFlags,
) -> None:
    """Join machines of your own, split a model over them by what they measure, write a manifest.

    What the manifest at --output names already stays, unless it is --remove'd: a second join adds
    a machine, or takes one out, and plans anew. The parts are cut beside it; --push sends them.

    \b
        pipeline-orch join VP1-… VP1-… --model-dir models/smollm2 --push
    """
    from pipeline.cli.join import join

    configure_logging(verbose=flags.verbose)
    join(lines or [], flags)


@takes_flags(flags=PushFlags)
def push_command(flags: PushFlags) -> None:
    """Send each machine of a joined manifest its own stage's part, and have it serve that.

    What lies there already is not sent again, and what was cut off goes on where it was.
    """
    from pipeline.cli.push import push_parts

    configure_logging(verbose=flags.verbose)
    push_parts(flags.manifest, flags.model_dir)


@takes_flags(flags=PartsFlags)
def parts_command(flags: PartsFlags) -> None:
    """List the parts that lie on the machines of a joined manifest, and remove old ones."""
    from pipeline.cli.push import list_parts

    configure_logging(verbose=flags.verbose)
    list_parts(flags)


@takes_flags(flags=ChatFlags, shared=PipelineFlags)
def chat_command(flags: ChatFlags, shared: PipelineFlags) -> None:
    """Talk with the model of a manifest in the terminal.

    Answers stream; Ctrl-C stops the one that comes, Ctrl-D ends the conversation, arrows bring
    earlier lines back. What is said is kept in memory alone. Lines may come from a pipe, too.

    \b
        pipeline-orch chat --manifest manifests/smollm2_2stage.json \\
                           --model-dir models/smollm2 --supervise --dev
    """
    from pipeline.cli.chat import chat

    configure_logging(
        verbose=flags.verbose,
        quiet=True,
        log_format=shared.log_format,
        marks=shared.development.marks,
    )
    chat(flags, shared)


@takes_flags(flags=TopFlags)
def top_command(flags: TopFlags) -> None:
    """Watch a running server: every stage's load, batch, KV, time per step, attestation.

    load is the share of time spent computing; ms/step the mean of what one step takes, by part:
    computing, cryptography, socket calls. `q` or Ctrl-C ends it.
    """
    from pipeline.cli.top import ServerAddress, top

    address = ServerAddress.parse(flags.url, flags.api_key_file)
    top(address, flags.interval, once=flags.once)
