"""Keys and values that outlive a process: its successor goes on from what is certain of them.

Whoever holds the file descriptor (a supervisor) hands it to one process after another. In front of
keys and values lie a record, which says whose they are, and two counts for each slot: tokens held,
and how far rows were written. A row is counted once all of it is written, and no longer counted
before any of it is zeroed: what a process has left half done when it is killed is never taken for
a row. Where counting would keep others waiting, what is to be counted is noted before.

Attack: keys and values are nearly the text. The memory has no name in any file system, is its
owner's alone, and gives what it holds to nobody who cannot name it: names are random, a new one
for each session. It is zeros again when a session ends, and before another one begins.
"""

import ctypes
import json
import math
import mmap
import os
import sys
from contextlib import suppress

import numpy as np

from pipeline.dtypes import ArrayDType, HostArray
from pipeline.errors import InputError
from pipeline.kernels.huge_pages import whole_pages
from pipeline.kernels.sealed_memory import Record, owned_file, read_record, write_record

NAME_BYTES = 16
# In front: the record, what is noted, the counts.
_NOTE_AT, _COUNTS_AT = 64 << 10, 128 << 10
_COUNT_BYTES = 8
_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # Linux's numbers (falloc.h)


class SessionMemory:
    """What is behind a descriptor: the slots of one session, and after it of the next."""

    def __init__(self, fd: int) -> None:
        """Raises InputError for what is not such memory, or another user's."""
        owned_file(fd)
        self._fd = fd

    @property
    def num_bytes(self) -> int:
        """What it takes now."""
        return os.fstat(self._fd).st_blocks * 512

    def begin(
        self, meaning: Record, name: bytes | None, num_slots: int, num_bytes: int, num_arrays: int
    ) -> "KeptSlots":
        """The slots of that `name`, if they are here and mean the same; else new and empty ones.

        `num_bytes`: of all their arrays. Raises MemoryError.
        """
        meaning = json.loads(json.dumps({**meaning, "num_slots": num_slots}))  # as it comes back
        is_found = name is not None and self._record() == {**meaning, "name": name.hex()}
        if name is None or not is_found:
            name = os.urandom(NAME_BYTES)
            os.ftruncate(self._fd, 0)  # nobody finds what another session has left
        counts = num_slots * 2 * _COUNT_BYTES
        size = _COUNTS_AT + counts + num_bytes + (num_arrays + 1) * mmap.PAGESIZE
        try:
            os.ftruncate(self._fd, size)
            pages = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            raise MemoryError(f"no {size} bytes of memory") from error
        write_record(self._fd, {**meaning, "name": name.hex()})
        kept = KeptSlots(self._fd, pages, name, num_slots)
        if is_found:
            # Where what is to be counted is noted, its rows have been announced nowhere.
            for slot, held in enumerate(kept.held):
                kept.written[slot] = max(kept.written[slot], held + 1)
        return kept

    def _record(self) -> Record:
        try:
            return read_record(self._fd)
        except InputError:
            return {}


class KeptSlots:
    """The memory of one session's slots, and how much each holds."""

    def __init__(self, fd: int, pages: mmap.mmap, name: bytes, num_slots: int) -> None:
        with suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        self._fd = fd
        self._pages = pages
        self.name = name
        view = memoryview(pages)
        counts = view[_COUNTS_AT:][: 2 * num_slots * _COUNT_BYTES].cast("q")
        # Tokens held, and how far rows were written, per slot.
        self.held, self.written = counts[:num_slots], counts[num_slots:]
        self._end = _COUNTS_AT + counts.nbytes
        self._note = view[_NOTE_AT + _COUNT_BYTES : _COUNTS_AT]
        self._note_bytes = view[_NOTE_AT:][:_COUNT_BYTES].cast("q")

    def zeros(self, shape: tuple[int, ...], dtype: ArrayDType) -> HostArray:
        """The next array: zeros, or what is there. They have to be asked for in the same order."""
        start = -(-self._end // mmap.PAGESIZE) * mmap.PAGESIZE
        num_elements = math.prod(shape)
        self._end = start + num_elements * dtype.itemsize
        array: HostArray = np.frombuffer(self._pages, dtype, num_elements, start).reshape(shape)
        return array

    def give_back(self, array: HostArray) -> None:
        """Let the memory of contiguous zeros go until they are used again."""
        first, num_bytes = whole_pages(array)
        if num_bytes > 0:
            address, size = ctypes.c_void_p(first), ctypes.c_size_t(num_bytes)
            _libc().madvise(address, size, mmap.MADV_REMOVE)

    def note(self, said: memoryview) -> None:
        """Keep what says which rows are all written and not counted, until it is noted away.

        What is too long is not kept: then these rows are not there for a successor.
        """
        if len(said) <= len(self._note):
            self._note[: len(said)] = said
            self._note_bytes[0] = len(said)

    def note_away(self) -> None:
        """They are counted."""
        self._note_bytes[0] = 0

    @property
    def noted(self) -> bytes:
        """What has been noted, and may be counted in part; empty if nothing."""
        return bytes(self._note[: self._note_bytes[0]])

    def forget(self) -> None:
        """Let nobody find them from now on."""
        write_record(self._fd, {})

    def release(self) -> None:
        """Give all memory back; whoever still refers to it finds zeros."""
        size = ctypes.c_long(os.fstat(self._fd).st_size)
        _libc().fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_long(0), size)


def _libc() -> ctypes.CDLL:
    assert sys.platform == "linux", "memory without a name is Linux's"
    return ctypes.CDLL(None, use_errno=True)
