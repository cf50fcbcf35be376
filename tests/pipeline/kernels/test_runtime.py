"""What is free of this process's memory goes back to the system."""

import ctypes
import re
import sys
from pathlib import Path

import pytest

from pipeline.kernels.runtime import return_freed_blocks

BLOCK_BYTES, NUM_BLOCKS = 1000, 40_000


def resident_bytes():
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="this C library gives back nothing on demand",
)
def test_what_lies_before_a_block_in_use_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    *blocks, last = [libc.malloc(BLOCK_BYTES) for _ in range(NUM_BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK_BYTES)
    for block in blocks:
        libc.free(block)
    held = resident_bytes()
    return_freed_blocks()
    assert held - resident_bytes() > BLOCK_BYTES * NUM_BLOCKS // 2
    libc.free(last)
