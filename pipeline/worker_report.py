"""What a worker tells its supervisor, a line each on stdout: how far it is, and why it ends."""

import os
import sys
import time
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import quote, unquote

# Between two lines about the same loading.
PAUSE_SECONDS = 0.2
MAX_LINE_BYTES = 1 << 14


class Loaded(NamedTuple):
    """So many bytes of its weights have been read and verified, of so many."""

    num_bytes: int
    of: int


class Listening(NamedTuple):
    """It takes connections, at these addresses."""

    control: str
    data_in: str


class Failed(NamedTuple):
    """It cannot go on, and why."""

    reason: str


Report = Loaded | Listening | Failed


class Reporter:
    """Tells whoever reads stdout; nothing where nobody does any more."""

    def __init__(self) -> None:
        self._next = 0.0

    def loaded(self, num_bytes: int, of: int) -> None:
        """A `pipeline.progress.Progress`, of which not every step is told."""
        now = time.monotonic()
        if now >= self._next or num_bytes == of:
            self._next = now + PAUSE_SECONDS
            _write(f"loaded {num_bytes} {of}")

    def listening(self, control: str, data_in: str) -> None:
        """It takes connections."""
        _write(f"listening {quote(control)} {quote(data_in)}")  # a path may hold a blank


def report_failure(command: str, text: str, code: int) -> None:
    """In place of a line on stderr: whoever starts a worker again and again says it once."""
    del command, code
    _write(f"failed {text}")


def parse_report(line: bytes) -> Report | None:
    """What a line says; None for any other, such as a library's."""
    what, _, rest = line.decode(errors="replace").strip().partition(" ")
    match what, rest.split():
        case "loaded", [done, total] if done.isdecimal() and total.isdecimal():
            return Loaded(int(done), int(total))
        case "listening", [control, data_in]:
            return Listening(unquote(control), unquote(data_in))
        case "failed", _:
            return Failed(rest)
    return None


def _write(line: str) -> None:
    data = " ".join(line.split()).encode()[: MAX_LINE_BYTES - 1]
    with suppress(OSError):  # it ends with whoever reads: stdin tells
        os.write(sys.stdout.fileno(), data + b"\n")
