"""Writing files so that nobody ever sees half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Write `text` whole or not at all. Raises InputError."""
    with _beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that `path` cannot be written. Raises InputError."""
    with _beside(path) as temporary:
        temporary.touch()


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name next to `path` that is free again in the end, whatever happens; errors name `path`."""
    temporary = None
    try:
        # Replacing /dev/null, or what /dev/stdout points at, would break them for everybody.
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise InputError(f"cannot write {path}: it is {kind}; name a file")
        temporary = path.with_name(f".veilpipe.{os.getpid()}")
        yield temporary
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
