"""Runs a command line to its exit code: one line for every error, whatever happens."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import typer

from pipeline.cli.logs import tell_error
from pipeline.cli.signals import termination_unwinds
from pipeline.cli.terminal import harmless
from pipeline.errors import PipelineError
from transport.errors import DeviceError, EndpointError, MisuseError, TransportError

# typer carries a copy of click since 0.2x and used the package before; this is either's root.
ClickException: type[Exception] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
)
EXIT_USAGE = 2
EXIT_FAILURE = 1
# Says why a command exits: its name, a message and the code.
Tell = Callable[[str, str, int], None]
READER_GONE = 128 + signal.SIGPIPE  # of stdout, as with `| head`
# What writing to stdout fails with; every other file is written under a handler that names it.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def new_app() -> typer.Typer:
    """A typer application without colours or tracebacks of its own."""
    return typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def run_app(app: typer.Typer, name: str, tell: Tell = tell_error) -> None:
    """Run a command line to its exit code; every error becomes one line, mostly on stderr."""
    _open_closed_streams()
    with termination_unwinds():
        code = _run(app, name, tell)
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


def _run(app: typer.Typer, name: str, tell: Tell) -> int:
    try:
        result = app(standalone_mode=False, prog_name=name)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
    except ClickException as error:
        message = getattr(error, "format_message", error.__str__)().rstrip(".")
        code = _fail(tell, name, f"{message}; see {name} --help", EXIT_USAGE)
    except (typer.Abort, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    except PipelineError as error:
        is_usage = error.exit_code == EXIT_USAGE
        code = _fail(
            tell, name, _with_variables(error) if is_usage else str(error), error.exit_code
        )
    except (DeviceError, EndpointError, MisuseError) as error:
        code = _fail(tell, name, _with_variables(error), EXIT_USAGE)
    except TransportError as error:
        code = _fail(tell, name, str(error), EXIT_FAILURE)
    except BrokenPipeError:
        code = READER_GONE
    except SystemExit as error:
        # Both click and rich answer a reader that has gone with an exit of 1.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = READER_GONE
    except Exception as error:
        code = _fail_unexpectedly(tell, name, error)
    return code


def _with_variables(error: Exception) -> str:
    """An error's message, with the variables that what it speaks of came from."""
    variables = ", ".join(getattr(error, "__notes__", ()))
    return f"{error} (from the environment: {variables})" if variables else str(error)


def _fail_unexpectedly(tell: Tell, name: str, error: Exception) -> int:
    if isinstance(error, OSError) and error.filename is None and error.errno in UNWRITABLE:
        return _fail(tell, name, f"cannot write to stdout: {error.strerror}", EXIT_FAILURE)
    if {"--verbose", "-v"} & set(sys.argv[1:]):
        print(harmless("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    # Where it happened, not the exception's own text: that may quote what must not reach a log.
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: in {Path(place.filename).name} line {place.lineno}"
    return _fail(
        tell, name, f"internal error: {what}; run with --verbose for details", EXIT_FAILURE
    )


def _fail(tell: Tell, name: str, message: str, code: int) -> int:
    tell(name, message, code)
    return code


def _open_closed_streams() -> None:
    """Give stdout and stderr closed by the caller (`>&-`) a descriptor that refuses writing.

    Python leaves them None, and the next socket or file would get their number.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_WRONLY)
            setattr(sys, name, os.fdopen(descriptor, "w"))
