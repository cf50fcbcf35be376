"""Weights in four bits: what they mean, and how floats come to them.

A weight is (level - zero) * scale: levels 0..15, and for each 32 inputs of an output a scale and a
zero, both float16. A zero need not be whole. So formats of four bits with groups of a multiple of
32 inputs fit as they are, be they symmetric, with whole zeros, or with a least number a group.
"""

from typing import NamedTuple

import numpy as np

from pipeline.dtypes import FLOAT16, FLOAT32, Floats, HostArray, to_floats
from pipeline.weights.quantization import from_groups, in_groups, num_groups

BITS = 4
INT4_MAX = 15
# The ends of a group's levels: those of its numbers, or some sixteenths nearer to 0.
_SHRUNK = tuple(np.float32(each) / np.float32(16) for each in (16, 15, 14, 13))


class Int4(NamedTuple):
    """Weights [out, in], each level in a byte; scales and zeros [out, groups] float16."""

    levels: HostArray
    scales: HostArray
    zeros: HostArray

    @property
    def num_in(self) -> int:
        """Inputs of each output."""
        return int(self.levels.shape[1])

    def turned(self) -> "Int4":
        """Where all three came the other way."""
        return Int4(self.levels.T, self.scales.T, self.zeros.T)


def quantise_int4(outputs: HostArray) -> Int4:
    """Weights [out, in], any floats, in four bits.

    Of grids with 16 levels from the least to the greatest number of a group (0 always among them),
    and of those that end some sixteenths short of either, each group gets the one with the least
    squared error, the first of equals: large numbers are clipped where the others gain by it.
    Halves round to even. The native kernels' own packing of floats gives the same bits.
    """
    # The inputs of a group first: numpy is fastest along rows of the same.
    numbers = np.ascontiguousarray(np.moveaxis(in_groups(to_floats(outputs)), 2, 0))
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = np.minimum(numbers.min(0), 0), np.maximum(numbers.max(0), 0)
        scales, zeros = _grid(low, high)
        is_number = to_floats(scales) < np.inf
        least = np.full(low.shape, np.inf, FLOAT32)
        for below in _SHRUNK:
            for above in _SHRUNK:
                own_scales, own_zeros = _grid(low * below, high * above)
                error = _error(numbers, own_scales, own_zeros)
                is_less = error < least
                least = np.where(is_less, error, least)
                scales = np.where(is_less, own_scales, scales)
                zeros = np.where(is_less, own_zeros, zeros)
        scales[~is_number], zeros[~is_number] = np.nan, 0
        levels = _levels(numbers, to_floats(scales), to_floats(zeros))
    levels[:, ~is_number] = 0
    whole = np.moveaxis(levels.astype(np.uint8), 0, 2)
    return Int4(from_groups(whole, outputs.shape[1]), scales, zeros)


def dequantise_int4(weights: Int4) -> Floats:
    """The weights [out, in] that these mean, in float32."""
    levels = in_groups(to_floats(weights.levels))
    found = (levels - to_floats(weights.zeros)[:, :, None]) * to_floats(weights.scales)[:, :, None]
    return from_groups(found, weights.num_in)


def pack_nibbles(levels: HostArray) -> HostArray:
    """[out, in], an even number of inputs -> [out, in / 2]: the first of two in the lower half."""
    packed = levels[:, 1::2].copy()
    packed <<= BITS
    packed |= levels[:, ::2]
    return packed


def unpack_nibbles(packed: HostArray) -> HostArray:
    """[out, in / 2] -> [out, in]."""
    levels = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    levels[:, ::2] = packed & 15
    levels[:, 1::2] = packed >> BITS
    return levels


def for_groups(sides: HostArray, group_size: int | None, num_in: int) -> HostArray:
    """Scales or zeros [out, groups of such a size, a multiple of 32] for groups of 32 inputs."""
    each = num_groups(num_in) if group_size is None else num_groups(group_size)
    return np.repeat(sides, each, axis=1)[:, : num_groups(num_in)]


def _grid(low: Floats, high: Floats) -> tuple[HostArray, HostArray]:
    scales = ((high - low) / np.float32(INT4_MAX)).astype(FLOAT16)
    inverses = _inverses(to_floats(scales))
    return scales, ((0 - low) * inverses).astype(FLOAT16)


def _inverses(scales: Floats) -> Floats:
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)


def _levels(numbers: Floats, scales: Floats, zeros: Floats) -> Floats:
    levels: Floats = numbers * _inverses(scales)
    levels += zeros
    np.rint(levels, out=levels)
    return np.clip(levels, 0, INT4_MAX, out=levels)


def _error(numbers: Floats, scales: HostArray, zeros: HostArray) -> Floats:
    """Squares summed from the first input on, as the native kernels do."""
    steps, starts = to_floats(scales), to_floats(zeros)
    off = _levels(numbers, steps, starts)
    off -= starts
    off *= steps
    off -= numbers
    off *= off
    total: Floats = np.zeros(steps.shape, FLOAT32)
    for each in off:
        total += each
    return total
