"""From comparisons to tokens: candidates are tried until one fits, position after position."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import Floats
from pipeline.leakage.evidence import Comparison, Features

# Candidates are computed so many at a time, at first, then many: mostly one of the first fits.
FIRST_TRIED = 8
# A candidate fits when it is so much nearer than the second.
DECISIVE = 0.25
LEAST_FEATURES = 8  # by fewer numbers many candidates are that near by chance
# One row beside a whole vocabulary, block by block.
BLOCK_ROWS = 64

Ids = npt.NDArray[np.int64]
# Rows at the attacked layer of candidates behind a prefix.
Rows = Callable[[Sequence[int], Sequence[int]], Floats]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Candidates, likeliest first, and what a language model thinks of each, if it was asked."""

    ids: Ids
    log_probabilities: Floats | None = None

    def first(self, count: int) -> "Proposal":
        """A copy of the likeliest of them."""
        own = self.log_probabilities
        return Proposal(self.ids[:count].copy(), None if own is None else own[:count].copy())


# What may stand behind a prefix, given what is compared of the observation there.
Propose = Callable[[Sequence[int], Floats, Features], Proposal]


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
    hidden_dim: int,
) -> list[int]:
    """Tokens of a text, those known in advance included."""
    found: list[int] = []
    recovered = np.empty((num_tokens, hidden_dim), np.float32)
    for position in range(num_tokens):
        if position < len(known_ids):
            choice, row = known_ids[position], rows_of(found, known_ids[position : position + 1])[0]
        else:
            target, features = comparison.at(position, recovered[:position])
            proposal = propose(found, target, features)
            choice, row = _choose(target, features, proposal, lambda ids: rows_of(found, ids))
        recovered[position] = row
        found.append(choice)
    return found


def _choose(
    target: Floats,
    features: Features,
    proposal: Proposal,
    rows_of: Callable[[Sequence[int]], Floats],
) -> tuple[int, Floats]:
    """The candidate that fits, and its row; what is decisively nearest ends the search."""
    distances = np.empty(0, np.float32)
    rows: list[Floats] = []
    for part in _parts(len(proposal.ids)):
        ids = proposal.ids[part].tolist()
        rows.append(rows_of(ids))
        off = np.square(features(rows[-1]) - target).sum(axis=1)
        distances = np.concatenate([distances, off])
        if _is_decided(distances, len(target)):
            break
    best = int(distances.argmin())
    if proposal.log_probabilities is not None and not _is_decided(distances, len(target)):
        # What is nearest tells how strong the noise is; under such noise, what is likeliest?
        variance = max(float(distances[best]) / len(target), 1e-30)
        scores = proposal.log_probabilities - distances / (2 * variance)
        best = int(scores.argmax())
    return int(proposal.ids[best]), np.concatenate(rows)[best]


def _parts(count: int) -> Iterator[slice]:
    yield slice(0, FIRST_TRIED)
    if count > FIRST_TRIED:
        yield slice(FIRST_TRIED, 8 * FIRST_TRIED)
    if count > 8 * FIRST_TRIED:
        yield slice(8 * FIRST_TRIED, count)


def _is_decided(distances: Floats, num_features: int) -> bool:
    if len(distances) < 2 or num_features < LEAST_FEATURES:
        return False
    first, second = np.partition(distances, 1)[:2]
    return bool(first < DECISIVE * DECISIVE * second)
