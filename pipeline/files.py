"""Files: looking for them, and writing them so that nobody sees half of one or another's."""

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import InputError


def is_file(path: Path) -> bool:
    """Whether a file is there. Raises InputError where that cannot even be asked."""
    try:
        return path.is_file()
    except OSError as error:  # a directory that is not ours to look into, a name too long
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def write_atomically(path: Path, text: str, *, is_private: bool = False) -> None:
    """Write `text` whole or not at all; a private file is its owner's alone to read.

    A symbolic link at `path` is replaced and what it leads to left alone: whoever may put a link
    into a shared directory does not choose what is overwritten. Raises InputError.
    """
    with _beside(path, is_private=is_private) as (temporary, descriptor):
        with os.fdopen(descriptor, "w", encoding="utf-8", closefd=False) as file:
            file.write(text)
        os.fsync(descriptor)
        temporary.replace(path)


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory that appears as `output` when its content is complete, or not at all.

    Raises InputError for one that is there and not empty, and where none can be written.
    """
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise InputError(f"{output} exists and is not an empty directory; choose another")
        output.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from error
    try:
        yield directory
        directory.chmod(0o755)
        directory.replace(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that `path` cannot be written. Raises InputError."""
    with _beside(path, is_private=True):
        pass


@contextmanager
def _beside(path: Path, *, is_private: bool) -> Iterator[tuple[Path, int]]:
    """A new file next to `path`, gone again in the end, whatever happens; errors name `path`."""
    temporary = descriptor = None
    try:
        # Replacing /dev/null, or what /dev/stdout points at, would break them for everybody.
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise InputError(f"cannot write {path}: it is {kind}; name a file")
        # No name that others could take first, and none that they have taken is opened.
        temporary = path.with_name(f".veilpipe.{secrets.token_hex(8)}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(temporary, flags, _mode(path, is_private=is_private))
        yield temporary, descriptor
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name, a name without a last part
        raise InputError(f"cannot write {path}: {error}") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if temporary is not None:
            with suppress(OSError, ValueError):
                temporary.unlink(missing_ok=True)


def _mode(path: Path, *, is_private: bool) -> int:
    """Permissions before the umask: never more than the file that is replaced had."""
    mode = 0o600 if is_private else 0o666
    with suppress(FileNotFoundError):
        before = path.lstat().st_mode
        if stat.S_ISREG(before):
            mode &= before
    return mode
