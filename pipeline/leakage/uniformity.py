"""Whether what a server sees could be told from random bytes: Pearson's chi-square test."""

import math

import numpy as np
import numpy.typing as npt

from pipeline.leakage.cards import Uniformity

NUM_BYTES, NUM_VALUES = 8, 256


def held_against_uniform(words: npt.NDArray[np.uint64]) -> Uniformity:
    """How often each value stands at each of a word's bytes, held against equally often."""
    raw = np.ascontiguousarray(words, "<u8").reshape(-1, 1).view(np.uint8)
    expected = len(raw) / NUM_VALUES
    statistic = 0.0
    for place in range(NUM_BYTES):
        counts = np.bincount(raw[:, place], minlength=NUM_VALUES)
        statistic += float(np.square(counts - expected).sum() / expected)
    degrees = NUM_BYTES * (NUM_VALUES - 1)
    return Uniformity(
        words=len(raw),
        chi_square=statistic,
        degrees=degrees,
        p_value=_upper_tail(statistic, degrees),
    )


def _upper_tail(statistic: float, degrees: int) -> float:
    """Of a chi-square with so many degrees of freedom, by Wilson and Hilferty's approximation."""
    spread = 2 / (9 * degrees)
    normal = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return math.erfc(normal / math.sqrt(2)) / 2
