"""Memory for weights in huge pages: a decode step that streams them runs 1.1 to 1.5 times as fast.

Where the system has none, or gives them without being asked, this is memory like any other. What
sessions fill bit by bit is in pages of the usual size.
"""

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import ArrayDType, HostArray

ALIGNMENT = 64
# Most weights are smaller than the 2 MiB of a huge page, so they share chunks. What of a chunk is
# never handed out is never resident.
CHUNK_BYTES = 64 << 20
# Linux's number (mman.h), which Python's module lacks: addresses alone, no memory set aside.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_libc = ctypes.CDLL(None)


# Gives so many bytes, zeroed or as they were sealed.
NewChunk = Callable[[int], npt.NDArray[np.uint8]]


class Arena:
    """Zeroed pieces, each aligned to 64 bytes; a chunk lives as long as any piece of it."""

    __slots__ = ("_chunk", "_new_chunk", "_prepare", "_used", "sizes")

    def __init__(
        self,
        new_chunk: NewChunk | None = None,
        prepare: Callable[[npt.NDArray[np.uint8]], None] | None = None,
    ) -> None:
        """`new_chunk`: where its memory comes from, if not from this process's own.

        `prepare` is told of each piece before it is handed out.
        """
        self._new_chunk = new_chunk or (lambda size: _pages(size, is_huge=True))
        self._prepare = prepare
        self._chunk = np.empty(0, np.uint8)
        self._used = 0
        # Of all pieces in turn: the same ones of the same memory lie at the same places.
        self.sizes: list[int] = []

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A piece that nobody else has, [num_bytes] of uint8. Raises MemoryError."""
        self.sizes.append(num_bytes)
        start = (self._used + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        if start + num_bytes > len(self._chunk):
            self._chunk, start = self._new_chunk(max(num_bytes, CHUNK_BYTES)), 0
        self._used = start + num_bytes
        piece = self._chunk[start : self._used]
        if self._prepare is not None:
            self._prepare(piece)
        return piece

    def array(self, shape: tuple[int, ...], dtype: ArrayDType) -> HostArray:
        """Zeros that nobody else has. Raises MemoryError."""
        array: HostArray = self.take(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        return array


def aligned(make: Callable[..., Any], shape: tuple[int, ...], dtype: ArrayDType) -> HostArray:
    """An array as `np.empty` or `np.zeros` makes it, from an address that 64 divides.

    numpy's own start anywhere, so that every vector a kernel reads may lie in two cache lines.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = make(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    array: HostArray = memory[start : start + num_bytes].view(dtype).reshape(shape)
    return array


def reserve(shape: tuple[int, ...], dtype: ArrayDType) -> HostArray:
    """Zeros of which only what is used takes memory, and takes none once they are let go.

    They may be far more than the machine has. What a C library's allocator hands out may do none of
    this. Raises MemoryError where the system sets memory aside for whatever is mapped.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    array: HostArray = _pages(max(num_bytes, 1))[:num_bytes].view(dtype).reshape(shape)
    return array


def give_back(array: HostArray) -> None:
    """Let the pages go that lie whole in what was `reserve`d and is zero; later they are zeros."""
    first, num_bytes = whole_pages(array)
    if num_bytes > 0 and sys.platform == "linux":  # elsewhere it means something else
        address, size = ctypes.c_void_p(first), ctypes.c_size_t(num_bytes)
        _libc.madvise(address, size, mmap.MADV_DONTNEED)


def whole_pages(array: HostArray) -> tuple[int, int]:
    """Address and bytes of the pages that lie whole in a contiguous array; none: 0 or less."""
    assert array.flags.c_contiguous, "else others' positions lie between these"
    first = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = array.ctypes.data + array.nbytes
    return first, (end - first) // mmap.PAGESIZE * mmap.PAGESIZE


def _pages(num_bytes: int, *, is_huge: bool = False) -> npt.NDArray[np.uint8]:
    """Zeroed whole pages of this process alone: huge ones if wanted and to be had, else none."""
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0 if is_huge else _NORESERVE)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=kind)
    except OSError as error:
        raise MemoryError(f"no {num_bytes} bytes of memory") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Where the system gives huge ones unasked, every slot would begin with several.
        with contextlib.suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_HUGEPAGE if is_huge else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.uint8)
