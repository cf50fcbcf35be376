"""Reproducible cpio archives (SVR4 "newc"), the format of an initial ramdisk.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from enclave.errors import CpioError

Buffer = bytes | bytearray | memoryview

# magic, then 13 fields of eight hexadecimal digits:
# ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
_MAGIC: Final = b"070701"
_HEADER_BYTES: Final = 6 + 13 * 8
_TRAILER: Final = "TRAILER!!!"
_HEX_DIGITS: Final = frozenset(b"0123456789abcdefABCDEF")
MAX_NAME_BYTES: Final = 4096  # the kernel's PATH_MAX
MAX_FILE_BYTES: Final = 0xFFFFFFFF  # eight hexadecimal digits


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive: path without leading slash, type and permissions in `mode`.

    `data` holds a file's bytes or a symbolic link's target; `device` a node's major and minor.
    """

    path: str
    mode: int
    data: Buffer = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str, mode: int = 0o755) -> Entry:
    """Return a directory's entry."""
    return Entry(path, stat.S_IFDIR | mode)


def regular(path: str, data: Buffer, mode: int = 0o644) -> Entry:
    """Return a regular file's entry."""
    return Entry(path, stat.S_IFREG | mode, data)


def symlink(path: str, target: str) -> Entry:
    """Return a symbolic link's entry."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def pack(entries: Iterable[Entry]) -> Iterator[Buffer]:
    """Yield the archive of `entries` piece by piece.

    The bytes depend on paths, modes and contents alone: entries are sorted by path, owned by root,
    dated 1970 and numbered in order; missing parent directories are added with mode 0755.

    Raises: CpioError for a path that is empty, absolute, unclean, too long or given twice.
    """
    for number, entry in enumerate(complete(entries), start=1):
        yield _header(entry, number)
        yield entry.data
        yield b"\0" * (-len(entry.data) % 4)
    yield _header(Entry(_TRAILER, 0), 0)


def unpack(archive: Buffer) -> Iterator[Entry]:
    """Yield the entries of one archive; the data are views of `archive`.

    Raises: CpioError, with the offset, for whatever is not a well-formed archive.
    """
    view = memoryview(archive)
    offset = 0
    while True:
        fields = _read_header(view, offset)
        mode, size, name_bytes = fields[1], fields[6], fields[11]
        start = offset + _HEADER_BYTES
        data_start = start + name_bytes + -(start + name_bytes) % 4
        data_end = data_start + size
        if name_bytes > MAX_NAME_BYTES or data_end > len(view):
            raise CpioError(f"entry at byte {offset} ends past the archive's {len(view)} bytes")
        path = _read_name(view[start : start + name_bytes], offset)
        if path == _TRAILER:
            return
        yield Entry(path, mode, view[data_start:data_end], (fields[9], fields[10]))
        offset = data_end + -data_end % 4


def complete(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries in archive order, with every parent directory. Raises: as `pack`."""
    by_path: dict[str, Entry] = {}
    for entry in entries:
        if entry.path in by_path:
            raise CpioError(f"{entry.path!r} is in the archive twice")
        by_path[_checked(entry)] = entry
    for path in list(by_path):
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            parent = "/".join(parts[:depth])
            if not stat.S_ISDIR(by_path.setdefault(parent, directory(parent)).mode):
                raise CpioError(f"{path!r} lies below {parent!r}, which is no directory")
    # Sorted by components, a directory comes right before what it holds.
    return [by_path[path] for path in sorted(by_path, key=lambda path: path.split("/"))]


def _checked(entry: Entry) -> str:
    path = entry.path
    if any(part in {"", ".", ".."} for part in path.split("/")) or "\0" in path:
        raise CpioError(f"{path!r} is no clean relative path")
    if path == _TRAILER or len(path.encode(errors="surrogateescape")) >= MAX_NAME_BYTES:
        raise CpioError(f"{path[:80]!r} cannot name an archive entry")
    if len(entry.data) > MAX_FILE_BYTES:
        raise CpioError(f"{path!r} holds {len(entry.data)} bytes, over {MAX_FILE_BYTES}")
    return path


def _header(entry: Entry, number: int) -> bytes:
    name = entry.path.encode(errors="surrogateescape") + b"\0"
    num_links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    fields = (number, entry.mode, 0, 0, num_links, 0, len(entry.data), 0, 0, major, minor)
    text = "".join(f"{field:08x}" for field in (*fields, len(name), 0))
    header = _MAGIC + text.encode() + name
    return header + b"\0" * (-len(header) % 4)


def _read_header(view: memoryview, offset: int) -> list[int]:
    header = bytes(view[offset : offset + _HEADER_BYTES])
    if len(header) < _HEADER_BYTES:
        raise CpioError(f"archive is cut short at byte {offset}")
    if header[:6] != _MAGIC:
        raise CpioError(f"no newc header at byte {offset}")
    digits = header[6:]
    if not _HEX_DIGITS.issuperset(digits):
        raise CpioError(f"header at byte {offset} has a field that is not hexadecimal")
    return [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]


def _read_name(raw: memoryview, offset: int) -> str:
    name = bytes(raw)
    if not name.endswith(b"\0") or b"\0" in name[:-1] or len(name) == 1:
        raise CpioError(f"entry at byte {offset} has no proper name")
    return name[:-1].decode(errors="surrogateescape")
