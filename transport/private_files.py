"""Files that hold secrets: nobody but their owner may read them, change them or swap them.

Attacks: a key that another user can read; one that he can replace by his own, in the file or by its
directory; a link laid where a secret is to be written or read.
"""

import errno
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from transport.errors import MisuseError

MAX_PRIVATE_BYTES: Final = 1 << 16  # keys and a certificate have a few thousand
_ALL: Final = stat.S_IRWXG | stat.S_IRWXO
_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def read_private(path: Path) -> bytes:
    """What a file of this user's holds. Raises: OSError; MisuseError where others may touch it."""
    with open_private(path) as file:
        return file.read(MAX_PRIVATE_BYTES)


def open_private(path: Path, *, writes: bool = False) -> BinaryIO:
    """A file of this user's, to be read, or to be changed in place. Raises as `read_private`."""
    try:
        with _own_directory(path) as opener, ExitStack() as on_failure:
            file = open(path.name, "r+b" if writes else "rb", opener=opener)  # noqa: SIM115
            on_failure.enter_context(file)
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise MisuseError(f"{path} is not a regular file")
            _require_own(path, info)
            if info.st_mode & _ALL:
                raise MisuseError(f"{path} is open to other users; run: chmod 600 {_quoted(path)}")
            on_failure.pop_all()
            return file
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise MisuseError(f"{path} is a symbolic link; name the file itself") from error


def create_private(path: Path, data: bytes) -> None:
    """Write a new file, readable by its owner alone, whole or not at all.

    Raises: OSError, FileExistsError too; MisuseError where others could swap the file.
    """
    with _own_directory(path) as opener, open(path.name, "xb", opener=opener) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise


def require_unwritable(path: Path, info: os.stat_result) -> None:
    """Holds a file's state against others who may write it. Raises: MisuseError."""
    _require_own(path, info)
    if info.st_mode & _WRITE:
        raise MisuseError(f"{path} can be changed by other users; run: chmod go-w {_quoted(path)}")


@contextmanager
def _own_directory(path: Path) -> Iterator[Callable[[str, int], int]]:
    """Opens files in the directory of `path`, which is held: what was checked is what is used."""
    flags = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
    directory = os.open(path.parent, flags)

    def opener(name: str, flags: int) -> int:
        # Not blocking, since a pipe of that name would wait for somebody at its other end.
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(name, flags, 0o600, dir_fd=directory)

    try:
        info = os.fstat(directory)
        if info.st_mode & stat.S_ISVTX:  # as in /tmp, where each may only change what is theirs
            _require_own(path.parent, info)
        else:
            require_unwritable(path.parent, info)
        yield opener
    finally:
        os.close(directory)


def _require_own(path: Path, info: os.stat_result) -> None:
    if info.st_uid not in (os.geteuid(), 0):  # root can change everything anyway
        raise MisuseError(
            f"{path} belongs to another user (uid {info.st_uid}); use one of your own"
        )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
