"""Packed weights that outlive a process: memory that is filled once, sealed, and mapped by others.

Whoever holds the file descriptor (a supervisor) hands it to one process after another. The first
fills it, and seals it once all hashes are right; nobody can write to it or change its size from
then on, so what was verified stays verified. What it holds is said in a record, which travels with
it under the same seals. It has no name in any file system and is its owner's alone.

Attack: another user, or a file put in the descriptor's place, could hand a stage weights that
nobody has verified. So only sealed memory of this user's own is taken.
"""

import ctypes
import fcntl
import json
import mmap
import os
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError

# Linux's numbers (fcntl.h, mman.h), which Python's modules lack or have from 3.13 on.
_GET_SEALS, _ADD_SEALS = 1034, 1033
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_WRITE = 1, 2, 4, 8
_SEALED = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW | _SEAL_WRITE
_MAP_FIXED, _MADV_COLLAPSE = 16, 25
_FAILED = ctypes.c_void_p(-1).value
HUGE_PAGE = 2 << 20
# The record's place, in front of the weights.
HEADER_BYTES = HUGE_PAGE
MAX_RECORD_BYTES = 64 << 10

Record = Mapping[str, Any]


class SealedMemory:
    """What is behind a descriptor: either to be filled and sealed, or sealed, to be mapped."""

    def __init__(self, fd: int) -> None:
        """Raises InputError for what is not such memory, or another user's."""
        self._fd = fd
        self.is_sealed = is_sealed(fd)
        self._end = HEADER_BYTES
        self._prepared = 0  # address up to which the last chunk is
        self._chunks: list[tuple[int, int, int]] = []  # address, offset, bytes
        self._preparing: _Preparing | None = None
        if not self.is_sealed:
            self.discard()

    def discard(self) -> None:
        """Let go of all that is not sealed: nobody may find it who has not verified it."""
        self._stop_preparing()
        os.ftruncate(self._fd, 0)

    def claim(self) -> None:
        """Have others see that somebody fills it. Raises MemoryError."""
        if not self.is_sealed:
            _grow(self._fd, self._end)

    def chunk(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The next part: zeros to be filled, or what is sealed. Raises MemoryError, InputError."""
        size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
        offset, self._end = self._end, self._end + size
        if not self.is_sealed:
            _grow(self._fd, self._end)
        elif self._end > os.fstat(self._fd).st_size:
            raise InputError("the weights that were handed over are laid out in another way")
        address = _aligned_addresses(size)
        access = mmap.PROT_READ if self.is_sealed else mmap.PROT_READ | mmap.PROT_WRITE
        kind = mmap.MAP_PRIVATE if self.is_sealed else mmap.MAP_SHARED
        _map(address, size, access, kind | _MAP_FIXED, self._fd, offset)
        self._prepared = address
        self._chunks.append((address, offset, size))
        found = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
        found.flags.writeable = not self.is_sealed
        return found

    def prepare(self, piece: npt.NDArray[np.uint8]) -> None:
        """Have what is about to be filled lie in huge pages soon, where the system can.

        Before it is filled: that is faster than pages of the usual size, which would be copied
        later. What of a chunk is never handed out takes no memory.
        """
        end = piece.ctypes.data + len(piece)
        size = -(-(end - self._prepared) // HUGE_PAGE) * HUGE_PAGE
        if self.is_sealed or size <= 0:
            return
        first, self._prepared = self._prepared, self._prepared + size
        if self._preparing is None:
            self._preparing = _Preparing()
        self._preparing.add(first, size)

    def _stop_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.stop()
            self._preparing = None

    def seal(self, record: Record) -> None:
        """End the writing, and say what is here. Raises OSError, and then nothing is sealed."""
        self._stop_preparing()
        write_record(self._fd, record)
        for address, offset, size in self._chunks:
            # in place: a seal against writing takes no mapping that could be written through
            _map(address, size, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_FIXED, self._fd, offset)
        fcntl.fcntl(self._fd, _ADD_SEALS, _SEALED)
        self.is_sealed = True

    def let_go(self) -> None:
        """Unmap it all: nothing that was handed out may be looked at any more."""
        self._stop_preparing()
        for address, _, size in self._chunks:
            _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
        self._chunks.clear()

    def record(self) -> Record:
        """What was sealed. Raises InputError."""
        return read_record(self._fd)


class _Preparing:
    """Huge pages made by a thread of its own, while what lies in those before is read and filled.

    The system zeroes each, which takes about as long as filling it.
    """

    def __init__(self) -> None:
        self._parts: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, first: int, size: int) -> None:
        """What lies there is made next; what is there already stays as it is."""
        self._parts.put((first, size))

    def stop(self) -> None:
        """Returns once nothing of it is looked at any more."""
        self._is_over = True
        self._parts.put((0, 0))
        self._thread.join()

    def _run(self) -> None:
        while True:
            first, size = self._parts.get()
            if self._is_over:
                return
            for page in range(first, first + size, HUGE_PAGE):
                # Only what is there can be put together, and reading it suffices for that.
                ctypes.c_uint8.from_address(page).value  # noqa: B018
            _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_COLLAPSE)


def is_sealed(fd: int) -> bool:
    """Whether what is behind a descriptor can be mapped. Raises InputError as `SealedMemory`."""
    owned_file(fd)
    try:
        seals = fcntl.fcntl(fd, _GET_SEALS)
    except OSError as error:
        raise InputError(f"descriptor {fd} is no memory that can be sealed") from error
    # As every file in /dev/shm: it would be overwritten, and could not be sealed.
    is_open = seals & _SEALED != _SEALED
    cannot_be_filled = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR
    if is_open and (seals & _SEAL_SEAL or cannot_be_filled):
        raise InputError(f"descriptor {fd} is no memory that can be sealed")
    return not is_open


def is_untouched(fd: int) -> bool:
    """Whether nobody has begun to fill memory: else somebody may be using what is there.

    Raises InputError as `SealedMemory`.
    """
    return not is_sealed(fd) and os.fstat(fd).st_size == 0


@contextmanager
def one_at_a_time(fd: int) -> Iterator[None]:
    """Among processes that do this with the same memory; one that dies makes way for the next."""
    fcntl.lockf(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(fd, fcntl.LOCK_UN)


def owned_file(fd: int) -> None:
    """Raises InputError unless a descriptor is of a file of this user's own."""
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise InputError(f"descriptor {fd} is no memory that can be sealed") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"descriptor {fd} is no memory that can be sealed")
    if status.st_uid != os.geteuid():
        raise InputError(f"descriptor {fd} is memory of another user")


def write_record(fd: int, record: Record) -> None:
    """Say in front of memory what it holds. Raises OSError."""
    raw = json.dumps(record, sort_keys=True).encode()
    assert len(raw) <= MAX_RECORD_BYTES, "a record is small"
    os.pwrite(fd, len(raw).to_bytes(8, "little") + raw, 0)


def read_record(fd: int) -> Record:
    """What memory is said to hold. Raises InputError."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    raw = os.pread(fd, min(length, MAX_RECORD_BYTES), 8)
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise InputError("the memory that was handed over does not say what it holds") from error
    return found if isinstance(found, dict) else {}


def _grow(fd: int, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise MemoryError(f"no {size} bytes of memory") from error


def _aligned_addresses(size: int) -> int:
    """Addresses kept for so many bytes, from one that a huge page can start at."""
    kept = _map(0, size + HUGE_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    return -(-kept // HUGE_PAGE) * HUGE_PAGE


def _map(address: int, size: int, access: int, kind: int, fd: int, offset: int) -> int:
    found: int | None = _libc().mmap(
        ctypes.c_void_p(address), ctypes.c_size_t(size), access, kind, fd, ctypes.c_long(offset)
    )
    if found is None or found == _FAILED:
        raise MemoryError(f"no {size} bytes of memory")
    return found


def _libc() -> ctypes.CDLL:
    assert sys.platform == "linux", "memory that can be sealed is Linux's"
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    return library
