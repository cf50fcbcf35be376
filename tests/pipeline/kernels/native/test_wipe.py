"""What threads have computed in holds nothing once it has been wiped."""

from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.memory import BYTES, process

# Rows of one number, their products and their attention; then everything that Python holds is
# zeroed, and what is left is the threads'.
PROGRAM = """
import sys
import numpy as np
from pipeline.kernels import _native
from pipeline.kernels.huge_pages import aligned

kind, rows, size = int(sys.argv[1]), 48, 512
_native.set_num_threads(2)
packed = aligned(np.zeros, (_native.packed_bytes(kind, size, size),), np.dtype(np.uint8))
x, y, weights = np.zeros((rows, size), "f4"), np.zeros((rows, size), "f4"), np.eye(size, dtype="f4")
if kind == _native.BF16:
    weights = (weights.view("u4") >> 16).astype("u2")
stored = _native.STORED_BF16 if kind == _native.BF16 else _native.STORED_F32
_native.pack(kind, packed, size, size, stored, weights, size, 1, 0, size, 0, size)
qkv, mixed = np.zeros((rows, 3 * size), "f4"), np.zeros((rows, size), "f4")
spans = np.array([[0, 0, rows, 0]])
keys, values = (aligned(np.zeros, (rows * size,), np.dtype("f4")) for _ in range(2))
print("ready", flush=True)
for line in sys.stdin:
    if line == "run\\n":
        for _ in range(50):  # so that both threads come to it
            x[:] = qkv[:] = float(sys.argv[2])
            _native.linear(kind, packed, None, x, y, rows, size, size, 0, None)
            _native.attend(qkv, 3 * size, mixed, keys, values, spans, 1, 8, 8, 64, rows, 0, 4, 0)
        for each in (x, y, qkv, mixed, keys, values):
            each[:] = 0
    else:
        _native.wipe()
    print("done", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc")
def test_threads_keep_nothing_of_what_they_computed(native, kind):
    number = np.float32(0.78515625)  # the same in bfloat16
    wanted = {np.full(BYTES // 4, number).tobytes(): "rows or sums"}
    if kind == native.BF16:
        wanted[(np.full(BYTES // 2, number).view("u4") >> 16).astype("u2").tobytes()] = "panels"
    with process(PROGRAM, kind, number) as program:
        assert program.search(wanted) == {}
        program.tell("run")
        assert program.search(wanted)
        program.tell("wipe")
        assert program.search(wanted) == {}
