"""Weights in another format, by `pipeline.kernels._native`: what stays in rows."""

from collections.abc import Mapping

import numpy as np

from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT8, UINT8, ArrayDType, HostArray
from pipeline.kernels import _native
from pipeline.weights.int4 import Int4
from pipeline.weights.quantization import num_groups
from pipeline.weights.tensor_sinks import fill_array

TABLES: Mapping[ArrayDType, int] = {FLOAT32: _native.F32, BFLOAT16: _native.BF16, INT8: _native.I8}
STORED: Mapping[ArrayDType, int] = {
    FLOAT32: _native.STORED_F32,
    BFLOAT16: _native.STORED_BF16,
    FLOAT16: _native.STORED_F16,
}


def strides(matrix: HostArray) -> tuple[int, int]:
    """Of a matrix, in elements."""
    down, right = matrix.strides
    return down // matrix.itemsize, right // matrix.itemsize


def fill(target: HostArray, rows: HostArray) -> None:
    """Set all of an array of rows to another of the same shape, floats to such as it has."""
    if rows.dtype == target.dtype:
        fill_array(target, rows)
    else:
        rows = np.ascontiguousarray(rows)
        _native.convert(STORED[rows.dtype], rows, TABLES[target.dtype], target, rows.size)


def quantise(outputs: HostArray) -> tuple[HostArray, HostArray]:
    """Values and scales of weights [out, in], any floats: as `weights.quantization`'s."""
    num_out, num_in = outputs.shape
    values = np.empty((num_out, num_in), INT8)
    scales = np.empty((num_out, num_groups(num_in)), BFLOAT16)
    quantise_into(outputs, values, scales)
    return values, scales


def quantise_into(outputs: HostArray, values: HostArray, scales: HostArray) -> None:
    """Set values [out, in] and scales to those of weights [out, in]."""
    if not (values.flags.c_contiguous and scales.flags.c_contiguous):
        values[...], scales[...] = quantise(outputs)
        return
    num_out, num_in = outputs.shape
    stored, steps = STORED[outputs.dtype], strides(outputs)
    _native.quantise(stored, outputs, *steps, num_in, num_out, values, scales)


def quantise_int4(outputs: HostArray) -> Int4:
    """Weights [out, in], any floats, in four bits: as `weights.int4`'s."""
    num_out, num_in = outputs.shape
    sides = (num_out, num_groups(num_in))
    found = Int4(
        np.empty((num_out, num_in), UINT8), np.empty(sides, FLOAT16), np.empty(sides, FLOAT16)
    )
    stored, steps = STORED[outputs.dtype], strides(outputs)
    _native.quantise_int4(stored, outputs, *steps, num_in, num_out, *found)
    return found
