"""A rotation leaves lengths and angles between a text's rows as they were (its Gram matrix).

Token after token: a candidate is held against the observation by its length, and by its products
with the rows of the tokens recovered so far. At layer 0, where all candidates are known at once,
two tokens are guessed together (`match_gram`), since one length alone says little where
observations are rounded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import Floats
from pipeline.leakage.evidence import Comparison, Evidence, Features

NUM_BY_LENGTH = 256  # candidates of each position: those nearest in length
NUM_PAIRS = 4096  # guesses of two tokens that are tried out on all the others
NUM_SWEEPS = 4  # each token again, by what the others are by now

CROWD, SAME = 1e-3, 1e-4  # how far from a length others crowd it, or are the same: relative

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GramComparison:
    """Lengths, and products with the rows before, over those rows' lengths."""

    observed: Floats

    def at(self, position: int, recovered: Mapping[int, Floats]) -> tuple[Floats, Features]:
        """[1 + recovered] invariants of the observation, and of candidates."""
        row = self.observed[position : position + 1]
        seen = self.observed[list(recovered)]
        meant = np.array(list(recovered.values())).reshape(seen.shape)
        return _invariants(row, seen)[0], lambda rows: _invariants(rows, meant)


def gram_matching(evidence: Evidence) -> Comparison:
    """Compare what rotations leave alone."""
    return GramComparison(evidence.observed)


def _invariants(rows: Floats, before: Floats) -> Floats:
    """Length of each row and its products with unit rows: [n, 1 + before]."""
    # norm() would copy what may be a whole vocabulary's
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    units = before / np.maximum(np.linalg.norm(before, axis=1, keepdims=True), 1e-30)
    found: Floats = np.column_stack([lengths, rows @ units.T])
    return found


def match_gram(observed: Floats, vocabulary: Callable[[int], Floats]) -> Ids:
    """Tokens of a whole text at layer 0: observed [tokens, hidden] -> [tokens].

    `vocabulary`: row of every token at a position, [vocab, hidden].
    """
    own = np.linalg.norm(observed, axis=1)
    short, rows, crowds = [], [], []
    table: Floats | None = None
    for position, length in enumerate(own):
        if (found := vocabulary(position)) is not table:
            table, lengths = found, np.linalg.norm(found, axis=1)
        off = np.abs(lengths - length)
        nearest = np.argsort(off, kind="stable")[:NUM_BY_LENGTH]
        short.append(nearest)
        rows.append(table[nearest])
        crowds.append(int((off < CROWD * length).sum()))
    if len(observed) == 1:
        return short[0][:1]
    gram = observed @ observed.T
    candidates = np.stack(rows)  # [tokens, nearest, hidden]
    chosen = _first_guess(candidates, gram, _anchors(crowds, own))
    for _ in range(NUM_SWEEPS):
        chosen = _sweep(candidates, gram, chosen)
    return np.stack(short)[np.arange(len(short)), chosen]


def _anchors(crowds: list[int], own: Floats) -> tuple[int, int]:
    """The two positions whose lengths are rarest in the vocabulary, of tokens that differ."""
    order = [int(each) for each in np.argsort(crowds, kind="stable")]
    first = order[0]
    other = [each for each in order[1:] if abs(own[each] - own[first]) > SAME * own[first]]
    return first, (other or order[1:])[0]


def _first_guess(rows: Floats, gram: Floats, anchors: tuple[int, int]) -> Ids:
    """For the best pair of candidates at the anchors: what is best everywhere, [tokens]."""
    first, second = anchors
    # How far each pair is from the product that was observed.
    miss = np.abs(rows[first] @ rows[second].T - gram[first, second])
    pairs = np.argsort(miss, axis=None)[:NUM_PAIRS]
    width = rows.shape[1]
    to_first = rows @ rows[first].T  # [tokens, nearest, nearest of the anchor]
    to_second = rows @ rows[second].T
    best, found = np.inf, np.zeros(len(rows), np.int64)
    for pair in pairs:
        one, two = divmod(int(pair), width)
        off = np.square(to_first[:, :, one] - gram[:, first, None])
        off += np.square(to_second[:, :, two] - gram[:, second, None])
        off[first] = off[second] = 0
        score = float(off.min(axis=1).sum())
        if score < best:
            best, found = score, off.argmin(axis=1)
            found[first], found[second] = one, two
    return found


def _sweep(rows: Floats, gram: Floats, chosen: Ids) -> Ids:
    """Each token again, by its products with what all the others are taken for."""
    taken = rows[np.arange(len(rows)), chosen]  # [tokens, hidden]
    products = rows @ taken.T  # [tokens, nearest, tokens]
    off = np.square(products - gram[:, None, :])
    own = np.arange(len(rows))
    lengths = np.square(rows).sum(axis=2)
    off[own, :, own] = np.square(lengths - gram[own, own, None])
    found: Ids = off.sum(axis=2).argmin(axis=1)
    return found
