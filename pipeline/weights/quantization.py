"""Weights in fewer bits: what a precision means, and how values come to it.

Only the matrices have a precision (linear layers, embedding, head); norms, biases and learned
positions stay in float32.

int8 is symmetric with one bfloat16 scale for each 32 inputs of an output. int4 (see int4.py) is for
linear layers; embedding and head, which make tokens of all that, are int8 then.
"""

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import BFLOAT16, FLOAT32, PRECISIONS, Floats, HostArray, Precision, to_floats
from pipeline.errors import ModelError

INT8_MAX = 127  # symmetric: -128 is never used
GROUP = 32  # inputs of an output that share a scale
SMALLEST_SCALE = 1e-30  # groups of smaller numbers are zeros; the inverse of a scale is finite
# In files, the scales of int8 tensor NAME are called NAME_scale.
SCALE_SUFFIX = "_scale"


def to_precision(name: str) -> Precision:
    """The precision of that name; raises ModelError listing those there are."""
    for precision in PRECISIONS:
        if name == precision:
            return precision
    raise ModelError(f"dtype {name!r} is not supported: use {', '.join(PRECISIONS)}")


def ends_precision(precision: Precision) -> Precision:
    """What embedding and head are held in, beside linear layers in `precision`."""
    return "int8" if precision == "int4" else precision


def num_groups(num_in: int) -> int:
    """Scales of one output; the last group may be a short one."""
    return -(-num_in // GROUP)


def quantise(outputs: HostArray) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint16]]:
    """Values and scales of weights [out, in]: [out, in] int8, [out, groups] bfloat16.

    Rounds halves to even and scales up, so that nothing is clipped and the same weights give the
    same bits everywhere; the native kernels' own packing of floats gives them too.
    """
    grouped = in_groups(to_floats(outputs))
    wanted = np.maximum(grouped.max(axis=2), -grouped.min(axis=2)) / np.float32(INT8_MAX)
    # The upper half of a float32 is a bfloat16: the least that is not below what is wanted.
    scales = ((wanted.view(np.uint32) + 0xFFFF) >> 16).astype(BFLOAT16)
    scales[to_floats(scales) < SMALLEST_SCALE] = 0
    steps = to_floats(scales)
    inverses = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
    with np.errstate(invalid="ignore"):  # of weights that are not numbers nothing is left anyway
        values = grouped * inverses[:, :, None]
        np.clip(np.rint(values, out=values), -INT8_MAX, INT8_MAX, out=values)
        return from_groups(values.astype(np.int8), outputs.shape[1]), scales


def dequantise(values: HostArray, scales: HostArray) -> Floats:
    """The weights that int8 `values` [out, in] and their scales mean: [out, in] float32, exact."""
    weights = in_groups(to_floats(values)) * to_floats(scales)[:, :, None]
    return from_groups(weights, values.shape[1])


def in_groups(outputs: Floats) -> Floats:
    """[out, in] -> [out, groups, GROUP], zeros at the end."""
    num_out, num_in = outputs.shape
    width = num_groups(num_in) * GROUP
    if width != num_in:
        padded = np.zeros((num_out, width), FLOAT32)
        padded[:, :num_in] = outputs
        outputs = padded
    return np.ascontiguousarray(outputs).reshape(num_out, -1, GROUP)


def from_groups(grouped: HostArray, num_in: int) -> HostArray:
    """[out, groups, GROUP] -> [out, in]."""
    return grouped.reshape(len(grouped), -1)[:, :num_in]
