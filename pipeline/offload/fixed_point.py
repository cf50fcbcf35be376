"""Floats as numbers of Z_2^64, and back.

A weight has WEIGHT_BITS bits of fraction. A row of inputs has as many as its product has room for:
how many is for whoever sends it to know, and is not sent. So no sum ever reaches 2^63, and a row
loses less than float32 rounds.
"""

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import Floats
from pipeline.errors import ModelError
from pipeline.offload.ring import Words

WEIGHT_BITS = 24
GREATEST_WEIGHT = 1 << (31 - WEIGHT_BITS)  # weights are held in 32 bits
_LARGEST_BIT = 62

Doubles = npt.NDArray[np.float64]


def weights_to_ring(outputs: Floats) -> npt.NDArray[np.int32]:
    """Weights in fixed point, of the same shape. Raises ModelError for those that do not fit."""
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        scaled = outputs * np.float32(1 << WEIGHT_BITS)  # exactly
    np.rint(scaled, out=scaled)
    if not (np.abs(scaled) < GREATEST_WEIGHT << WEIGHT_BITS).all():
        raise ModelError(
            f"a weight is {GREATEST_WEIGHT} or more, or no number: fixed point has no room for it"
        )
    return scaled.astype(np.int32)


class Reach:
    """The greatest sum of the magnitudes of one output's weights, of those that have come."""

    def __init__(self, num_out: int) -> None:
        self._sums = np.zeros(num_out, np.int64)
        self.value = 1

    def add(self, first: int, fixed: npt.NDArray[np.int32]) -> None:
        """Count weights of outputs first.., [n, some of their inputs]."""
        sums = self._sums[first : first + len(fixed)]
        sums += np.abs(fixed).sum(axis=1, dtype=np.int64)
        self.value = max(self.value, int(sums.max(initial=1)))


def to_ring(rows: npt.NDArray[np.floating], reach: int) -> tuple[Words, Doubles]:
    """Rows in fixed point, and what a product of each is to be multiplied by to be one of floats.

    `reach`: the greatest sum of the magnitudes of one output's weights, in fixed point. Shapes:
    [rows, in], [rows]. A row with what is no number becomes zeros, and its product no numbers.
    """
    greatest = np.abs(rows).max(axis=1, initial=0)
    is_sound = np.isfinite(greatest)
    _, magnitudes = np.frexp(np.where(is_sound, greatest, 0))
    # |x| < 2^magnitude and reach < 2^bit_length, so every sum stays below 2^62, and rounding
    # adds no more than reach / 2
    bits = _LARGEST_BIT - reach.bit_length() - magnitudes
    sound = np.where(is_sound[:, None], rows, 0).astype(np.float64)
    words = np.rint(np.ldexp(sound, bits[:, None])).astype(np.int64).view(np.uint64)
    return words, np.where(is_sound, np.ldexp(1.0, -(bits + WEIGHT_BITS)), np.nan)


def from_ring(products: Words, scales: Doubles) -> Doubles:
    """Products of rows as floats: [rows, out], [rows]."""
    found: Doubles = products.view(np.int64) * scales[:, None]
    return found
