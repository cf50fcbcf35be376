"""What is held by whom: rows and answers by a stranger who has no key, receipts at home."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.dtypes import HostArray
from pipeline.scx.errors import ScxError
from pipeline.scx.products import attend_to


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """What the holder gets: keys and values, each [KV heads, rows, width]."""

    keys: HostArray = field(repr=False)
    values: HostArray = field(repr=False)

    def __post_init__(self) -> None:
        """Raise ScxError for arrays that are no rows."""
        if self.keys.ndim != 3 or self.keys.shape != self.values.shape:
            raise ScxError("encoded keys and values are two arrays [KV heads, rows, width]")

    @property
    def num_rows(self) -> int:
        """Decoys are among them."""
        return int(self.keys.shape[1])

    def part(self, start: int, count: int) -> "EncodedRows":
        """A view of some of them."""
        chosen = np.s_[:, start : start + count]
        return EncodedRows(self.keys[chosen], self.values[chosen])

    def followed_by(self, more: "EncodedRows") -> "EncodedRows":
        """These rows and then those, as the holder keeps them."""
        keys, values = ((self.keys, more.keys), (self.values, more.values))
        return EncodedRows(np.concatenate(keys, 1), np.concatenate(values, 1))


@dataclass(frozen=True, slots=True)
class Receipt:
    """What home keeps of a cache: how many rows it encoded at first and in all, and their digest.

    num_padding: tokens of the sequence that were masked and have no rows. chunks: first row and
    number of those that came later, but together.

    Attack: whoever holds the cache cannot make one, but can hand back an older cache with its
    receipt. So home keeps its own, or at least the number of rows.
    """

    num_first: int
    num_rows: int
    digest: bytes
    num_padding: int = 0
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def steps(self) -> list[tuple[int, int]]:
        """First row and number of rows of all that came after the first ones.

        Raises ValueError for numbers that contradict each other: a receipt may come from a file.
        """
        steps, at = [], self.num_first
        for start, count in (*self.chunks, (self.num_rows, 0)):
            if at < 0 or start < at or count < 0:
                raise ValueError("rows are counted twice, or are less than none")
            steps += [(row, 1) for row in range(at, start)]
            steps += [(start, count)] if count else []
            at = start + count
        if at != self.num_rows:
            raise ValueError("more rows came together than there are")
        return steps


@dataclass(frozen=True, slots=True)
class Answer:
    """What the holder computed for each segment, in float32 or float64.

    Shapes: outputs [KV heads, queries, segments, width], log_sums [KV heads, queries, segments].
    """

    outputs: HostArray = field(repr=False)
    log_sums: HostArray = field(repr=False)


def attend(asked: HostArray, rows: EncodedRows, segments: Sequence[tuple[int, int]]) -> Answer:
    """What the holder computes: attention of each segment's queries over its rows, without a key.

    Shapes: asked [KV heads, queries, segments, width]; rows of float32 or float64. What is
    computed has the queries' precision.
    """
    outputs = np.empty_like(asked)
    log_sums = np.empty(asked.shape[:3])
    for at, (start, stop) in enumerate(segments):
        queries = np.ascontiguousarray(asked[:, :, at])
        seen = rows.keys[:, start:stop], rows.values[:, start:stop]
        outputs[:, :, at], log_sums[:, :, at] = attend_to(queries, *seen)
    return Answer(outputs, log_sums)
