"""A token's distribution in whole numbers, the same to the last bit wherever it is computed."""

from dataclasses import dataclass
from math import factorial

import numpy as np
import numpy.typing as npt

from pipeline.stego.errors import StegoError

_LN2 = 0.6931471805599453
_LOG2E = 1.4426950408889634
_TAYLOR = tuple(1 / factorial(order) for order in range(8, -1, -1))  # off by 2**-32 at ln(2)/2
_SUM_BITS = 61
_MAX_WEIGHT_BITS = 50  # what a float64 holds as a whole number, and room to spare
_NEGLIGIBLE = -60.0  # e to this is less than half of the smallest weight
_CHUNK = 4096  # what fits a first-level cache: the whole vocabulary at once takes twice as long


@dataclass(frozen=True, slots=True, eq=False)
class TokenWeights:
    """Tokens that may come next and how likely each is.

    Shapes: ids int64 [n] in rising order; weights uint64 [n], each at least 1; total is their sum,
    below 2**62.
    """

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.uint64]
    total: int

    def bounds(self, index: int) -> tuple[int, int]:
        """The sums of the weights before a token and up to it. Raises StegoError for no token."""
        if not 0 <= index < self.weights.size:
            raise StegoError(f"token {index} was chosen of {self.weights.size} possible ones")
        low = int(self.weights[:index].sum())
        return low, low + int(self.weights[index])

    def index_at(self, point: int) -> int:
        """The token between whose `bounds` a number lies, 0 <= point < total."""
        ends = np.cumsum(self.weights)
        return int(np.searchsorted(ends, np.uint64(point), side="right"))


def token_weights(logits: npt.NDArray[np.float32]) -> TokenWeights:
    """Weights in proportion to exp(logits), each token of more than -inf at least 1.

    Shapes: logits [vocab]. Raises StegoError where they are no distribution.
    """
    # Only operations that IEEE 754 rounds correctly: numpy's own exponential depends on the
    # processor, and weights that differ in one bit at one token would lose the whole message.
    greatest = logits.max(initial=-np.inf)
    if not np.isfinite(greatest):
        raise StegoError("no token can be chosen: the model's logits are no numbers")
    ids = np.flatnonzero(logits > -np.inf)
    weight_bits = min(_MAX_WEIGHT_BITS, _SUM_BITS - int(ids.size).bit_length())
    shifted = logits[ids].astype(np.float64)
    shifted -= np.float64(greatest)
    weights = np.empty(ids.size, np.uint64)
    for start in range(0, ids.size, _CHUNK):
        chances = _exp(np.maximum(shifted[start : start + _CHUNK], _NEGLIGIBLE))
        chances *= 2.0**weight_bits
        weights[start : start + _CHUNK] = np.maximum(np.rint(chances), 1)
    return TokenWeights(ids, weights, int(weights.sum()))


def _exp(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The exponential of -60 <= x <= 0, as 2**n * exp(rest) of the nearest whole n."""
    exponents = np.rint(x * _LOG2E)
    rest = x - exponents * _LN2
    series = np.full_like(x, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        series *= rest
        series += coefficient
    powers = ((exponents.astype(np.int64) + 1023) << 52).view(np.float64)
    return series * powers
