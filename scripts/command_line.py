"""Command lines of the scripts: what cannot be meant is one line on stderr, before anything starts."""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from pipeline.errors import PipelineError
from pipeline.tasks import first_leaf


class Parser(argparse.ArgumentParser):
    """Without the usage in front of an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is a whole number within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            bounds = f"from {least}" + (f" to {most}" if most is not None else "")
            raise argparse.ArgumentTypeError(f"{text}: give a whole number {bounds}")
        return value

    return parse


def wholes(least: int) -> Callable[[str], list[int]]:
    """Several of them with commas between."""
    parse_one = whole(least)
    return lambda text: [parse_one(part) for part in text.split(",")]


def positive(text: str) -> float:
    """A number above 0."""
    return _finite(text, lambda value: value > 0, "above 0")


def not_negative(text: str) -> float:
    """A number from 0."""
    return _finite(text, lambda value: value >= 0, "from 0")


def _finite(text: str, is_good: Callable[[float], bool], bound: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not is_good(value):
        raise argparse.ArgumentTypeError(f"{text}: give a number {bound}")
    return value


def unwind_on_sigterm() -> None:
    """Take SIGTERM as Ctrl-C, so that the processes a script has started end with it."""
    # A shell without job control starts what runs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def run_main(name: str, main: Callable[[], int | None]) -> NoReturn:
    """Exit with what `main` returns; what a user can act on is one line."""
    try:
        code = main()
    except BaseException as error:
        cause = first_leaf(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(cause, KeyboardInterrupt):
            sys.exit(130)
        if isinstance(cause, PipelineError):
            print(f"{name}: error: {cause}", file=sys.stderr)
            sys.exit(cause.exit_code)
        if isinstance(cause, OSError) and cause.filename is not None:
            print(f"{name}: error: {cause.filename}: {cause.strerror}", file=sys.stderr)
            sys.exit(2)
        raise
    sys.exit(code)
