import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pipeline.kernels.huge_pages import (
    ALIGNMENT,
    CHUNK_BYTES,
    Arena,
    aligned,
    give_back,
    reserve,
)


def test_pieces_are_zeroed_aligned_and_nobody_elses():
    arena = Arena()
    sizes = [1, 64, 65, 5000, CHUNK_BYTES - 4096, 3, CHUNK_BYTES + 1, 7]
    pieces = [arena.take(size) for size in sizes]
    for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.shape == (size,)
        assert piece.ctypes.data % ALIGNMENT == 0
        assert not piece[:1000].any()
        assert not piece[-1000:].any()
        piece.fill(number + 1)
    for number, piece in enumerate(pieces):
        assert (piece == number + 1).all()


def test_more_than_the_machine_has_is_said_to_be_too_much_memory():
    with pytest.raises(MemoryError, match="bytes of memory"):
        Arena().take(1 << 60)


def test_a_piece_outlives_its_arena():
    arena = Arena()
    first, second = arena.take(100), arena.take(100)
    second.fill(7)
    del arena, first
    gc.collect()
    assert (second == 7).all()


@pytest.mark.parametrize("size", [1, 2 << 20])
def test_small_pieces_share_chunks(size):
    arena = Arena()
    first, second = arena.take(size), arena.take(size)
    assert second.ctypes.data - first.ctypes.data == max(size, ALIGNMENT)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 5), (7,), (3, 5, 2)], ids=str)
def test_arrays_start_where_a_cache_line_does(shape, dtype):
    arrays = [aligned(np.zeros, shape, dtype) for _ in range(20)]
    for array in arrays:
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.flags.c_contiguous
        assert array.ctypes.data % ALIGNMENT == 0 or not array.size
        assert not array.any()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_reserved_takes_memory_only_while_it_is_used():
    before = resident()
    arrays = [reserve((1000, 400), FLOAT16) for _ in range(30)]  # 24 MB in pieces of 800 KB
    assert resident() - before < 2 << 20
    for array in arrays:
        assert array.shape == (1000, 400)
        assert array.ctypes.data % ALIGNMENT == 0
        assert not array.any()
        array.fill(1)
    assert resident() - before > 20 << 20
    del array, arrays
    assert resident() - before < 2 << 20


def test_nothing_can_be_reserved():
    assert reserve((0, 3, 0), FLOAT32).shape == (0, 3, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_far_more_can_be_reserved_than_the_machine_has():
    array = reserve((1 << 10, 1 << 30), FLOAT16)
    array[1000, 5] = 1
    assert array[1000, :7].sum() == 1
    assert not array[3, -5:].any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_given_back_is_the_systems_and_what_lies_beside_it_stays():
    array = reserve((1 << 20,), FLOAT32)
    array.fill(7)
    full = resident()
    part = array[100:-100]
    part.fill(0)
    give_back(part)
    assert full - resident() > 3 << 20
    assert (array[:100] == 7).all()
    assert (array[-100:] == 7).all()
    assert not part.any()
    part.fill(2)
    assert (part == 2).all()


@pytest.mark.parametrize("size", [0, 1, 1023])
def test_less_than_a_page_is_kept(size):
    array = reserve((1 << 12,), FLOAT32)
    array.fill(3)
    array[500 : 500 + size] = 0
    give_back(array[500 : 500 + size])
    assert np.count_nonzero(array) == (1 << 12) - size
