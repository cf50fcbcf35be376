"""The least a token can cost: reading every weight once. memory_floor.py NUM_BYTES THREADS.

A matrix-vector product through numpy's BLAS reads faster than any sum of torch or numpy; each
thread has its own slice, and BLAS one thread in each.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from protocol import Ask, Clock, Result, serve

from pipeline.models.runtime import pin_blas

WIDTH = 4096


def main() -> None:
    num_bytes, threads = int(sys.argv[1]), int(sys.argv[2])
    pin_blas()
    num_rows = num_bytes // 4 // WIDTH // threads
    slices = [np.ones((num_rows, WIDTH), np.float32) for _ in range(threads)]
    vector = np.ones(WIDTH, np.float32)
    outs = [np.empty(num_rows, np.float32) for _ in range(threads)]

    def read(index: int) -> None:
        np.dot(slices[index], vector, out=outs[index])

    with ThreadPoolExecutor(threads) as pool:

        def generate(ask: Ask) -> Result:
            clock, result = Clock(), Result()
            for _ in range(ask.steps):
                list(pool.map(read, range(threads)))
                result.ms.append(clock.lap_ms())
            return result

        serve(generate, f"{4 * num_rows * WIDTH * threads} bytes")


if __name__ == "__main__":
    main()
