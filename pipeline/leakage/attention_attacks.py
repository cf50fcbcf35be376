"""What a holder of encoded keys and values makes of them, with the public weights.

Orthogonal keys leave the length of every row in every head, and products of rows; RoPE leaves the
lengths too. So a token is told by as many lengths as there are KV heads, twice, whatever its
position and the keys. The phase between two rows' keys tells how far they are apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import Floats
from pipeline.leakage.attacks.least_squares import aligned_bases
from pipeline.leakage.attention_rows import HeldText, LayerReaders
from pipeline.leakage.evidence import Features, Pairs

Ids = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


def lengths(keys: Floats, values: Floats) -> Doubles:
    """[KV heads, rows, width] both -> [rows, 2 KV heads]."""
    both = np.concatenate((keys, values)).astype(np.float64)
    found: Doubles = np.sqrt(np.einsum("hrw,hrw->hr", both, both)).T
    return found


def flat(keys: Floats, values: Floats) -> Floats:
    """A row of all heads: [rows, numbers]."""
    return np.concatenate((*keys, *values), -1)


def nearest_rows(observed: Floats | Doubles, table: Floats | Doubles) -> Ids:
    """Index of the nearest row of a table, by exact differences where they are few."""
    if observed.shape[1] <= _FEW:
        return np.array([np.square(table - row).sum(1).argmin() for row in observed], np.int64)
    squares = np.einsum("ij,ij->i", table, table)
    return np.array((squares - 2 * observed @ table.T).argmin(1), np.int64)


_FEW = 16


# Each takes seconds, since every token's keys are others there.
_MOST_PLACES = 16


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Every token's keys and values in layer 0, before RoPE."""

    readers: LayerReaders
    keys: Floats
    values: Floats

    @classmethod
    def of(cls, readers: LayerReaders, embedding: Floats) -> "Vocabulary":
        """Of a model's embedding."""
        return cls(readers, readers.keys_of(embedding), readers.values_of(embedding))


def by_rows(vocabulary: Vocabulary, texts: Sequence[HeldText]) -> list[Ids]:
    """Rows as they are, with RoPE's phase."""
    return _place_by_place(texts, vocabulary, lambda each: each)


def by_sorted_rows(vocabulary: Vocabulary, texts: Sequence[HeldText]) -> list[Ids]:
    """Each head's numbers in order, which no permutation of them changes."""
    return _place_by_place(texts, vocabulary, np.sort)


def _place_by_place(
    texts: Sequence[HeldText], vocabulary: Vocabulary, change: Callable[[Floats], Floats]
) -> list[Ids]:
    """Of every text, the token nearest at each of its first positions; all texts are as long."""
    rows = np.stack([flat(change(held.keys), change(held.values)) for held in texts])
    found, values = [], change(vocabulary.values)
    for position in range(min(rows.shape[1], _MOST_PLACES)):
        turned = vocabulary.readers.turned(vocabulary.keys, [position])
        table = flat(change(turned), values)
        found.append(nearest_rows(rows[:, position], table))
    return list(np.stack(found, 1))


def by_value_lengths(vocabulary: Vocabulary, held: HeldText) -> Ids:
    """Lengths of values alone: one number a KV head."""
    count = len(held.values)
    table = lengths(vocabulary.keys, vocabulary.values)[:, count:]
    return nearest_rows(lengths(held.keys, held.values)[:, count:], table)


def by_lengths(vocabulary: Vocabulary, held: HeldText) -> Ids:
    """Lengths of keys and values, which need no position."""
    return nearest_rows(
        lengths(held.keys, held.values), lengths(vocabulary.keys, vocabulary.values)
    )


def in_order_by_phase(vocabulary: Vocabulary, held: HeldText) -> Ids:
    """A prompt in a secret order: its tokens by lengths, their places by RoPE's phase.

    Each head's order is another, so what is compared is one head's keys; tokens come from that
    head's lengths of key and value alone.
    """
    keys, values = held.mixed
    table = lengths(vocabulary.keys[:1], vocabulary.values[:1])
    tokens = nearest_rows(lengths(keys[:1], values[:1]), table)
    count = len(tokens)
    # products of an observed row with all others, beside those of every distance
    products = keys[0] @ keys[0].T
    plain = vocabulary.keys[0][tokens]
    readers = vocabulary.readers
    anchor = int(np.argmax(np.einsum("ij,ij->i", plain, plain)))
    offsets = np.arange(1 - count, count)
    expected = np.stack(
        [readers.turned(plain[None], [int(offset)])[0] @ plain[anchor] for offset in offsets]
    )
    # A text starts at 0: of the shifts that leave all in place, the best is that of the text.
    miss = np.square(expected - products[anchor]).T  # [rows, offsets]
    best = min(
        (_assigned(miss, offsets, start, anchor, count) for start in range(count)),
        key=lambda found: found[0],
    )[1]
    ordered = np.zeros(count, np.int64)
    ordered[best] = tokens
    return ordered


def _assigned(miss: Floats, offsets: Ids, start: int, anchor: int, count: int) -> tuple[float, Ids]:
    """Each row's place if the anchor's is `start`, taken by those that fit best first."""
    inside = miss[:, (offsets >= -start) & (offsets < count - start)].copy()
    inside[anchor] = np.inf
    inside[:, start] = np.inf
    places = np.full(count, start, np.int64)
    total = 0.0
    for _ in range(count - 1):
        row, place = np.unravel_index(int(inside.argmin()), inside.shape)
        total += float(inside[row, place])
        places[row] = place
        inside[row] = np.inf
        inside[:, place] = np.inf
    return total, places


def solved(readers: LayerReaders, held: HeldText, known: Floats) -> tuple[Floats, Features]:
    """Values by a known beginning: its rows give each head's S, or as much of it as they span.

    known: [tokens, hidden]. What is compared of the text, [tokens, numbers], and of candidates.
    """
    public, count = readers.values_of(known), len(known)
    bases = [
        aligned_bases(Pairs(mine, theirs[:count]))
        for mine, theirs in zip(public, held.values, strict=True)
    ]

    def features(rows: Floats) -> Floats:
        values = readers.values_of(rows)
        return np.hstack([each @ meant for each, (_, meant) in zip(values, bases, strict=True)])

    observed = [each @ seen for each, (seen, _) in zip(held.values, bases, strict=True)]
    return np.hstack(observed), features


def decoded(readers: LayerReaders, rows: Floats) -> tuple[Floats, Features]:
    """Values of whoever has the keys, and of candidates."""

    def features(candidates: Floats) -> Floats:
        return np.hstack(list(readers.values_of(candidates)))

    return features(rows), features


def with_lengths(readers: LayerReaders, held: HeldText) -> tuple[Floats, Features]:
    """Lengths of the text's rows, and of candidates."""

    def features(rows: Floats) -> Floats:
        return lengths(readers.keys_of(rows), readers.values_of(rows)).astype(np.float32)

    return lengths(held.keys, held.values).astype(np.float32), features


def share(found: Sequence[int] | Ids, text: Sequence[int], num_known: int = 0) -> tuple[int, int]:
    """How many tokens of a text are right, and of how many."""
    pairs = list(zip(found, text, strict=True))[num_known:]
    return sum(int(mine) == other for mine, other in pairs), len(pairs)
