"""From logits to the final distribution, and from there to a token."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.sampling.filters import (
    Logits,
    keep_min_p,
    keep_most_likely,
    keep_top_k,
    keep_top_p,
    scale_temperature,
)
from pipeline.sampling.params import SamplingParams

_BLOCK = 256


def final(logits: Logits, params: SamplingParams) -> Logits:
    """Logits of the distribution to choose from: temperature, top-k, top-p and min-p applied."""
    if params.temperature == 0:
        return keep_most_likely(logits)
    logits = scale_temperature(logits, params.temperature)
    if params.top_k > 0:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    return logits


def token_at(logits: Logits, uniform: float) -> int:
    """The token at which the cumulative probability passes `uniform`, in [0, 1)."""
    # Sums of blocks first, then inside one: adding up the whole vocabulary in turn takes six times
    # as long. The first sum strictly above has a weight of its own, so no masked token is drawn.
    blocks = np.zeros((-(-logits.size // _BLOCK), _BLOCK), np.float32)
    np.exp(logits - logits.max(), out=blocks.reshape(-1)[: logits.size])
    sums = blocks.sum(axis=1, dtype=np.float64)
    ends = np.cumsum(sums)
    target = uniform * ends[-1]
    block = _first_above(ends, target, sums)
    rest = max(target - (ends[block] - sums[block]), 0.0)
    inside = np.cumsum(blocks[block], dtype=np.float64)
    return block * _BLOCK + _first_above(inside, rest, blocks[block])


def _first_above(
    cumulative: npt.NDArray[np.float64], target: float, weights: npt.NDArray[Any]
) -> int:
    """The first index whose sum is above `target`; the last with a weight if rounding passed it."""
    index = int(np.searchsorted(cumulative, target, side="right"))
    return index if index < cumulative.size else int(np.flatnonzero(weights)[-1])
