"""From comparisons to tokens: candidates are tried until one fits, position after position."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import Floats
from pipeline.leakage.evidence import Comparison, Features

# A candidate fits when it is so much nearer than the second.
DECISIVE = 0.25
LEAST_FEATURES = 8  # by fewer numbers many candidates are that near by chance
# Or, whatever there is to compare, when nothing but rounding is left: of the squared length.
EXACT = 1e-10
# More are not subtracted from one by one, at the price of rounding: that takes ten times as long.
MANY_ROWS = 4096
# One row beside a whole vocabulary, block by block.
BLOCK_ROWS = 64

Ids = npt.NDArray[np.int64]
# Rows at the attacked layer of candidates behind a prefix.
Rows = Callable[[Sequence[int], Sequence[int]], Floats]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens to try, likeliest first, and what a language model thinks of each, if it was asked."""

    ids: Ids
    log_probabilities: Floats | None = None

    def part(self, first: int, last: int | None = None) -> "Candidates":
        """A copy of some of them."""
        own = self.log_probabilities
        return Candidates(
            self.ids[first:last].copy(), None if own is None else own[first:last].copy()
        )


class Propose(Protocol):
    """What may stand behind a prefix."""

    def __call__(
        self, prefix: Sequence[int], target: Floats, features: Features, *, is_sure: bool
    ) -> Iterator[Candidates]:
        """Given what is compared there; the next ones are asked for when none before fits.

        `is_sure`: every token of the prefix is known or fits.
        """


def nearest(observed: Floats, vocabulary: Floats) -> Ids:
    """Index of the nearest of [vocab, features] for each of [tokens, features]."""
    squares = np.square(vocabulary).sum(axis=1)
    blocks = [
        (squares - 2 * (observed[first : first + BLOCK_ROWS] @ vocabulary.T)).argmin(axis=1)
        for first in range(0, len(observed), BLOCK_ROWS)
    ]
    return np.concatenate(blocks)


def match_text(
    comparison: Comparison,
    known_ids: Sequence[int],
    num_tokens: int,
    propose: Propose,
    rows_of: Rows,
) -> list[int]:
    """Tokens of a text, those known in advance included."""
    found: list[int] = []
    # Rows of tokens that are known or fit: others would mislead what compares with them.
    recovered: dict[int, Floats] = {}
    for position in range(num_tokens):
        if position < len(known_ids):
            choice = known_ids[position]
            recovered[position] = rows_of(found, [choice])[0]
        else:
            target, features = comparison.at(position, recovered)
            is_sure = len(recovered) == position
            parts = propose(found, target, features, is_sure=is_sure)
            choice, row = _choose(target, features, parts, lambda ids: rows_of(found, ids))
            if row is not None:
                recovered[position] = row
        found.append(choice)
    return found


def _choose(
    target: Floats,
    features: Features,
    parts: Iterator[Candidates],
    rows_of: Callable[[Sequence[int]], Floats],
) -> tuple[int, Floats | None]:
    """The candidate that fits, and its row; None for the row of one that is only the best."""
    distances, ids, priors = (np.empty(0, np.float32) for _ in range(3))
    rows: list[Floats] = []
    for part in (each for each in parts if len(each.ids)):
        rows.append(rows_of(part.ids.tolist()))
        off = _squared_distances(features(rows[-1]), target)
        distances, ids = np.concatenate([distances, off]), np.append(ids, part.ids)
        if part.log_probabilities is not None:
            priors = np.concatenate([priors, part.log_probabilities])
        is_exact = distances.min() <= EXACT * np.square(target).sum()
        if is_exact or (len(target) >= LEAST_FEATURES and _is_decided(distances)):
            break
    best = int(distances.argmin())
    is_fit = _is_decided(distances)
    if not is_fit and len(priors) == len(ids):
        # What is nearest tells how strong the noise is; under such noise, what is likeliest?
        variance = max(float(distances[best]) / len(target), 1e-30)
        best = int((priors - distances / (2 * variance)).argmax())
    return int(ids[best]), np.concatenate(rows)[best] if is_fit else None


def _squared_distances(table: Floats, target: Floats) -> Floats:
    """Of each row [n, features] from one."""
    found: Floats
    if len(table) <= MANY_ROWS:
        found = np.square(table - target).sum(axis=1)
    else:
        squares = np.einsum("ij,ij->i", table, table)
        found = np.maximum(squares - 2 * (table @ target) + target @ target, 0)
    return found


def _is_decided(distances: Floats) -> bool:
    if len(distances) < 2:
        return False
    first, second = np.partition(distances, 1)[:2]
    return bool(first < DECISIVE * DECISIVE * second)
