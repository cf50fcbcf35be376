"""What both commands share: one line for every error, exit codes, logs, signals."""

import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import trio
import typer

from pipeline.errors import InputError, PipelineError
from transport.endpoint import Endpoint, parse_endpoint
from transport.errors import EndpointError, MisuseError, TransportError

# typer carries a copy of click since 0.2x and used the package before; this is either's root.
ClickException: type[Exception] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
)
EXIT_USAGE = 2
EXIT_FAILURE = 1

ManifestOption = Annotated[
    Path, typer.Option("--manifest", metavar="FILE", help="Manifest all parties share (JSON).")
]
DevOption = Annotated[
    bool,
    typer.Option(
        "--dev",
        help="Development: evidence from a local CA instead of attestation. No privacy from hosts.",
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log every step to stderr; never any content.")
]


def new_app() -> typer.Typer:
    """A typer application without colours or tracebacks of its own."""
    return typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command line to its exit code; every expected error becomes one line on stderr."""
    try:
        code = app(standalone_mode=False, prog_name=name)
    except ClickException as error:
        message = getattr(error, "format_message", error.__str__)()
        code = _fail(name, f"{message.rstrip('.')}; see {name} --help", EXIT_USAGE)
    except (typer.Abort, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    except PipelineError as error:
        code = _fail(name, str(error), error.exit_code)
    except (EndpointError, MisuseError) as error:
        code = _fail(name, str(error), EXIT_USAGE)
    except TransportError as error:
        code = _fail(name, str(error), EXIT_FAILURE)
    except BrokenPipeError:
        # The reader of stdout has gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code if isinstance(code, int) else 0)


def _fail(name: str, message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"{name}: error: {line}", file=sys.stderr)
    return code


def configure_logging(*, verbose: bool, quiet: bool = False) -> None:
    """Log to stderr as key=value lines."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(
        stream=sys.stderr,
        level=level,
        format="time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )


async def wait_for_end_of_stdin() -> None:
    """Return when whoever holds the other end of stdin is gone.

    A supervisor that is killed outright cannot end its workers itself. (The kernel's parent-death
    signal follows the thread that started a process, not the process, and fires too early.)
    """
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
        async for _ in stdin:
            pass


def to_endpoint(text: str | None, option: str) -> Endpoint | None:
    """Parse an address flag. Raises InputError naming the flag."""
    if text is None:
        return None
    try:
        return parse_endpoint(text)
    except EndpointError as error:
        raise InputError(f"{option}: {error}") from error


def run_until_signalled(main: Callable[[], Awaitable[None]]) -> int | None:
    """Run `main` under trio; SIGINT or SIGTERM cancels it. Returns the signal's number, if any."""
    received: int | None = None

    async def supervise() -> None:
        nonlocal received
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    nonlocal received
                    async for number in signals:
                        received = number
                        nursery.cancel_scope.cancel()
                        return

                nursery.start_soon(wait)
                await main()
                nursery.cancel_scope.cancel()

    from pipeline.tasks import first_leaf

    try:
        trio.run(supervise)
    except BaseExceptionGroup as group:
        raise first_leaf(group) from None
    return received
