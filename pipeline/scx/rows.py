"""What is held by whom: rows and answers by a stranger who has no key, receipts at home."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.dtypes import HostArray
from pipeline.scx.errors import ScxError


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

    def followed_by(self, more: "EncodedRows") -> "EncodedRows":
        """These rows and then those, as the holder keeps them."""
        keys, values = ((self.keys, more.keys), (self.values, more.values))
        return EncodedRows(np.concatenate(keys, 1), np.concatenate(values, 1))


@dataclass(frozen=True, slots=True)
class Receipt:
    """What home keeps of a cache: how many rows it encoded at first and in all, and their digest.

    num_padding: tokens of the sequence that were masked and have no rows.

    Attack: whoever holds the cache cannot make one, but can hand back an older cache with its
    receipt. So home keeps its own, or at least the number of rows.
    """

    num_first: int
    num_rows: int
    digest: bytes
    num_padding: int = 0


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
        scores = asked[:, :, at] @ rows.keys[:, start:stop].mT
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        sums = weights.sum(-1, keepdims=True)
        outputs[:, :, at] = weights @ rows.values[:, start:stop] / sums
        log_sums[:, :, at] = (top.astype(np.float64) + np.log(sums.astype(np.float64)))[..., 0]
    return Answer(outputs, log_sums)
