"""Which requests' tokens travel together in one step."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.dtypes import HostArray


class Segment(NamedTuple):  # made for every token, in a third of a frozen dataclass's time
    """`num_tokens` consecutive tokens of the request in KV slot `slot`, the first at `position`."""

    slot: int
    position: int
    num_tokens: int


Batch = Sequence[Segment]


def num_tokens(batch: Batch) -> int:
    """Total tokens of a step: the leading dimension of every tensor it carries."""
    return sum(segment.num_tokens for segment in batch)


def first_rows(batch: Batch) -> Iterator[int]:
    """Where in a step's tensors each segment's rows begin."""
    start = 0
    for segment in batch:
        yield start
        start += segment.num_tokens


def positions_of(batch: Batch) -> HostArray:
    """Position of every row, [rows] int64."""
    ranges = [np.arange(each.position, each.position + each.num_tokens) for each in batch]
    return np.concatenate(ranges)
