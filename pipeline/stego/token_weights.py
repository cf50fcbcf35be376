"""A token's distribution in whole numbers, the same to the last bit wherever it is computed."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Tokens that may come next and how likely each is.

    Shapes: ids int64 [n] in rising order; weights uint64 [n], each at least 1; total is their sum,
    below 2**62.
    """

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.uint64]
    total: int
