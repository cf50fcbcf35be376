"""What encoding a head's rows takes, in one pass, and attending to such rows; compiled, or not."""

from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np

from pipeline.dtypes import FLOAT32, HostArray
from pipeline.scx.keys import Order

# With more of them a product of matrices is the faster way.
_FEW_QUERIES = 16
_WIDEST = 512  # that the native kernels take


def encode_head(
    rows: HostArray, matrix: HostArray | None, order: Order | None, encoded: HostArray
) -> None:
    """P(rows R) of one head into `encoded`, all [rows, width]; none of P and R where it is None."""
    native = _native(rows.shape[1])
    if order is None:
        if matrix is None:
            encoded[:] = rows
        else:
            np.matmul(rows, matrix, out=encoded)
        return
    if native is not None and rows.dtype == FLOAT32 and rows.flags.c_contiguous:
        native.take_rows(rows, len(rows), order, len(order), rows.shape[1], matrix, encoded)
        return
    np.take(rows, order, 0, encoded, "clip")  # "raise" would go through a copy
    if matrix is not None:
        encoded[:] = encoded @ matrix


def attend_to(
    queries: HostArray, keys: HostArray, values: HostArray
) -> tuple[HostArray, HostArray]:
    """Attention of queries [heads, queries, width] over rows, and the logs of its sums, float64.

    keys, values: [heads, rows, width], of which one row lies behind another. Sums have the queries'
    precision.
    """
    heads, count, width = queries.shape
    native = _native(width) if count <= _FEW_QUERIES else None
    if native is not None and queries.dtype == keys.dtype == FLOAT32 and queries.flags.c_contiguous:
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


@cache
def _native(width: int) -> ModuleType | None:
    """What is faster for rows of a width: no kernels, whose choice takes a test of them all."""
    try:
        found = import_module("pipeline.kernels._native")
    except ImportError:
        return None
    return found if found.features() and width % 16 == 0 and width <= _WIDEST else None
