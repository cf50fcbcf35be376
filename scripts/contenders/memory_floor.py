"""The least a token can cost: reading every weight once. memory_floor.py NUM_BYTES THREADS.

As fast as anything here reads: a product with one vector, over huge pages, by the native kernels
where they run, else by numpy's BLAS, which is quicker than any sum of torch or numpy.
"""

import mmap
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from protocol import Ask, Clock, Result, serve

from pipeline.kernels.runtime import pin_blas

WIDTH = 4096

try:
    from pipeline.kernels import _native
except ImportError:  # no compiler where this was installed
    _native = None


def huge_pages(num_rows: int) -> np.ndarray:
    """[rows, WIDTH] of ones: memory never written to would be read from one page of zeros."""
    pages = mmap.mmap(-1, 4 * num_rows * WIDTH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    weights = np.frombuffer(pages, np.float32).reshape(num_rows, WIDTH)
    weights[:] = 1
    return weights


def native_reader(num_rows: int, threads: int) -> Callable[[], object]:
    _native.set_num_threads(threads)
    num_rows = num_rows // 64 * 64  # whole tiles: what is packed is as large as it seems
    weights = huge_pages(num_rows)
    assert _native.packed_bytes(_native.F32, WIDTH, num_rows) == weights.nbytes
    vector, out = np.ones(WIDTH, np.float32), np.empty(num_rows, np.float32)
    packed, x, y = (array.ctypes.data for array in (weights, vector, out))
    arrays = (weights, vector, out)  # live as long as the reader does

    def read(arrays: tuple = arrays) -> None:
        _native.linear(_native.F32, packed, 0, x, y, 1, WIDTH, num_rows, 0, 0)

    return read


def numpy_reader(num_rows: int, threads: int) -> Callable[[], object]:
    """Each thread has its own slice, and BLAS one thread in each."""
    pin_blas()
    slices = [huge_pages(num_rows // threads) for _ in range(threads)]
    outs = [np.empty(len(part), np.float32) for part in slices]
    vector = np.ones(WIDTH, np.float32)
    pool = ThreadPoolExecutor(threads)

    def read(index: int) -> None:
        np.dot(slices[index], vector, out=outs[index])

    return lambda: list(pool.map(read, range(threads)))


def main() -> None:
    num_rows, threads = int(sys.argv[1]) // 4 // WIDTH, int(sys.argv[2])
    is_native = _native is not None and bool(_native.features())
    read = (native_reader if is_native else numpy_reader)(num_rows, threads)

    def generate(ask: Ask) -> Result:
        clock, result = Clock(), Result()
        for _ in range(ask.steps):
            read()
            result.ms.append(clock.lap_ms())
        return result

    serve(generate, f"{4 * num_rows * WIDTH} bytes, {'native' if is_native else 'numpy'}")


if __name__ == "__main__":
    main()
