"""What both commands share: one line for every error, exit codes, signals."""

import errno
import math
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import trio
import typer

from pipeline.agreement.manifest import Manifest
from pipeline.cli.logs import tell_error
from pipeline.cli.terminal import harmless
from pipeline.errors import InputError, PipelineError
from transport.endpoint import Endpoint, TcpEndpoint, parse_endpoint
from transport.errors import DeviceError, EndpointError, MisuseError, TransportError

# typer carries a copy of click since 0.2x and used the package before; this is either's root.
ClickException: type[Exception] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
)
EXIT_USAGE = 2
EXIT_FAILURE = 1
READER_GONE = 128 + signal.SIGPIPE  # of stdout, as with `| head`
# What writing to stdout fails with; every other file is written under a handler that names it.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

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
DataOutPortOption = Annotated[
    int | None,
    typer.Option(
        "--data-out-port",
        min=1,
        max=65535,
        metavar="PORT",
        help="Port of results instead of the manifest's, on the same host.",
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
    """Run a command line to its exit code; every error becomes one line on stderr."""
    _open_closed_streams()
    with _termination_unwinds():
        code = _run(app, name)
    if not _can_flush() or code == READER_GONE:
        # It has been reported; keep the interpreter from complaining about it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _can_flush() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _run(app: typer.Typer, name: str) -> int:
    try:
        result = app(standalone_mode=False, prog_name=name)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
    except ClickException as error:
        message = getattr(error, "format_message", error.__str__)()
        code = _fail(name, f"{message.rstrip('.')}; see {name} --help", EXIT_USAGE)
    except (typer.Abort, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    except PipelineError as error:
        code = _fail(name, str(error), error.exit_code)
    except (DeviceError, EndpointError, MisuseError) as error:
        code = _fail(name, str(error), EXIT_USAGE)
    except TransportError as error:
        code = _fail(name, str(error), EXIT_FAILURE)
    except BrokenPipeError:
        code = READER_GONE
    except SystemExit as error:
        # Both click and rich answer a reader that has gone with an exit of 1.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = READER_GONE
    except Exception as error:
        code = _fail_unexpectedly(name, error)
    return code


def _fail_unexpectedly(name: str, error: Exception) -> int:
    if isinstance(error, OSError) and error.filename is None and error.errno in UNWRITABLE:
        return _fail(name, f"cannot write to stdout: {error.strerror}", EXIT_FAILURE)
    if {"--verbose", "-v"} & set(sys.argv[1:]):
        print(harmless("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    # Where it happened, not the exception's own text: that may quote what must not reach a log.
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: in {Path(place.filename).name} line {place.lineno}"
    return _fail(name, f"internal error: {what}; run with --verbose for details", EXIT_FAILURE)


def _fail(name: str, message: str, code: int) -> int:
    tell_error(name, message, code)
    return code


def _open_closed_streams() -> None:
    """Give stdout and stderr closed by the caller (`>&-`) a descriptor that refuses writing.

    Python leaves them None, and the next socket or file would get their number.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_WRONLY)
            setattr(sys, name, os.fdopen(descriptor, "w"))


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """SIGTERM and SIGINT raise meanwhile, so that half-written files and directories go away."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        sys.exit(128 + number)

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, leave),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def wait_for_end_of_stdin() -> None:
    """Return when whoever holds the other end of stdin is gone.

    A supervisor that is killed outright cannot end its workers itself. (The kernel's parent-death
    signal follows the thread that started a process, not the process, and fires too early.)
    """
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
        async for _ in stdin:
            pass


def finite(value: float | None) -> float | None:
    """Callback of an option that takes a number: `nan` and `inf` pass every bound of typer's.

    Raises typer.BadParameter.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number of that kind")
    return value


def to_endpoint(text: str | None, option: str) -> Endpoint | None:
    """Parse an address flag. Raises InputError naming the flag."""
    if text is None:
        return None
    try:
        return parse_endpoint(text)
    except EndpointError as error:
        raise InputError(f"{option}: {error}") from error


def results_address(
    manifest: Manifest, stage_idx: int, address: Endpoint | None, port: int | None
) -> Endpoint | None:
    """Where a stage's results go by the flags for that, `port` on the manifest's host.

    None where no flag says so. Raises InputError.
    """
    if port is None:
        return address
    if address is not None:
        raise InputError("--data-out-port: the other flag for results names a port already")
    named = manifest.endpoint(stage_idx).data_out.to_endpoint()
    if not isinstance(named, TcpEndpoint):
        raise InputError(f"--data-out-port {port}: results go to {named}, which is no TCP address")
    return TcpEndpoint(named.host, port)


def run_until_signalled(main: Callable[[], Awaitable[None]]) -> int | None:
    """Run `main` under trio; SIGINT or SIGTERM cancels it. Returns the signal's number, if any.

    Raises what `main` raises, itself and not in a group.
    """
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
        # A signal often goes to the whole process group: peers that end are not the news then.
        if received is None:
            raise first_leaf(group) from None
    return received
