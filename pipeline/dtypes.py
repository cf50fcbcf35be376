"""Arrays, the number formats they hold, and the names of these.

numpy has no bfloat16: here an array of uint16 holds such numbers, as their bits.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

# What kernels compute with: a numpy array, or a tensor where torch computes.
Array = Any
HostArray = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
ArrayDType = np.dtype[Any]

FLOAT32: ArrayDType = np.dtype(np.float32)
FLOAT16: ArrayDType = np.dtype(np.float16)
BFLOAT16: ArrayDType = np.dtype(np.uint16)
INT8: ArrayDType = np.dtype(np.int8)
UINT8: ArrayDType = np.dtype(np.uint8)

# What weights are held in.
Precision = Literal["float32", "bfloat16", "int8", "int4"]
PRECISIONS: Mapping[Precision, ArrayDType] = MappingProxyType(
    {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8, "int4": UINT8}  # two in a byte
)
# Bytes that a weight takes in memory, with its share of scales and zeros.
WEIGHT_BYTES: Mapping[Precision, float] = MappingProxyType(
    {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0625, "int4": 0.625}
)
# What keys and values are cached in, for weights of a precision: on any kernels.
KV_DTYPES: Mapping[Precision, ArrayDType] = MappingProxyType(
    {"float32": FLOAT32, "bfloat16": FLOAT16, "int8": FLOAT16, "int4": FLOAT16}
)
# By their names in safetensors.
STORED_DTYPES: Mapping[str, ArrayDType] = MappingProxyType(
    {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16, "I8": INT8}
)
_QUIET_NAN = 0x7FC0


def to_floats(array: HostArray) -> Floats:
    """The same numbers in float32, exactly; the array itself where it holds such."""
    if array.dtype == BFLOAT16:  # the upper half of a float32
        return np.left_shift(array, 16, dtype=np.uint32).view(np.float32)
    return array.astype(np.float32, copy=False)


def from_floats(values: Floats, dtype: ArrayDType) -> HostArray:
    """The nearest numbers in another format, ties to even; the array itself for float32."""
    if dtype == BFLOAT16:
        return _to_bfloat16(values)
    with np.errstate(over="ignore"):  # float16 has infinities for these
        return values.astype(dtype, copy=False)


def _to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    found = rounded.astype(np.uint16)
    is_nan = np.isnan(values)
    if is_nan.any():
        found[is_nan] = _QUIET_NAN
    return found
