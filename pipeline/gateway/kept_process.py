"""A script of ours in a process of its own, kept to be asked again and again.

What it works on comes from strangers; the kernel bounds what a process takes, and its end is not
ours.
"""

import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

# Much longer than such a process may compute; for one that does not even do that.
_WALL_SECONDS = 20.0


class KeptProcess:
    """Reads what it is asked from `requests`, and answers on `answers`."""

    def __init__(self, script: Path) -> None:
        # -I: neither the directory we are in nor the environment decide what is imported.
        self._process = subprocess.Popen(  # noqa: S603  (ourselves)
            [sys.executable, "-I", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.requests = cast(BinaryIO, self._process.stdin)
        self.answers = cast(BinaryIO, self._process.stdout)
        self.end = weakref.finalize(self, _end, self._process)

    @property
    def is_running(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """It is killed if this takes too long."""
        watch = threading.Timer(_WALL_SECONDS, self._process.kill)
        watch.start()
        try:
            yield
        finally:
            watch.cancel()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # what it never read
                stream.close()
    process.wait()
