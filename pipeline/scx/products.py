"""What encoding a head's rows takes, in one pass, and attending to such rows; compiled, or not."""

from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np

from pipeline.dtypes import FLOAT32, HostArray
from pipeline.scx.keys import Order

# Rows that are put in order and multiplied at a time: they stay in the processor's cache.
_CHUNK_ROWS = 1024
# With more of them a product of matrices is the faster way.
_FEW_QUERIES = 16
_LANES = 16
_NO_SCALES = np.zeros(0, np.uint16)


def encode_head(
    rows: HostArray, matrix: HostArray | None, order: Order | None, encoded: HostArray
) -> None:
    """P(rows R) of one head into `encoded`, all [rows, width]; none of P and R where it is None."""
    if order is None:
        if matrix is None:
            encoded[:] = rows
        else:
            np.matmul(rows, matrix, out=encoded)
        return
    if matrix is None:
        _take(rows, order, encoded)
        return
    taken = np.empty((min(_CHUNK_ROWS, len(rows)), rows.shape[1]), rows.dtype)
    for start in range(0, len(rows), _CHUNK_ROWS):
        chunk = order[start : start + _CHUNK_ROWS]
        _take(rows, chunk, taken[: len(chunk)])
        np.matmul(taken[: len(chunk)], matrix, out=encoded[start : start + len(chunk)])


def attend_to(
    queries: HostArray, keys: HostArray, values: HostArray
) -> tuple[HostArray, HostArray]:
    """Attention of queries [heads, queries, width] over rows, and the logs of its sums, float64.

    keys, values: [heads, rows, width], of which one row lies behind another. Sums have the queries'
    precision.
    """
    heads, count, width = queries.shape
    native = _native()
    is_plain = queries.dtype == keys.dtype == FLOAT32 and queries.flags.c_contiguous
    if native is not None and is_plain and count <= _FEW_QUERIES and width % _LANES == 0:
        outputs, log_sums = np.empty_like(queries), np.empty((heads, count))
        stride = keys.strides[0] // keys.itemsize
        sizes = (stride, heads, count, keys.shape[1], width)
        native.attend_rows(queries, keys, values, *sizes, outputs, log_sums)
        return outputs, log_sums
    scores = queries @ keys.mT
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    sums = weights.sum(-1, keepdims=True)
    mixed: HostArray = weights @ values / sums
    return mixed, (top.astype(np.float64) + np.log(sums.astype(np.float64)))[..., 0]


def _take(rows: HostArray, order: Order, taken: HostArray) -> None:
    """The rows of these numbers."""
    native = _native()
    is_plain = rows.dtype == FLOAT32 and rows.flags.c_contiguous and taken.flags.c_contiguous
    if native is None or not is_plain:
        np.take(rows, order, 0, taken, "clip")  # "raise" would go through a copy
        return
    count, width = rows.shape
    native.lookup(native.F32, rows, _NO_SCALES, count, width, order, 1, len(order), 0, taken)


@cache
def _native() -> ModuleType | None:
    """What copies rows faster, where it can: no kernels, whose choice takes a test of them all."""
    try:
        found = import_module("pipeline.kernels._native")
    except ImportError:
        return None
    return found if found.features() else None
