"""Which requests' tokens travel together in one step."""

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):  # made for every token, in a third of a frozen dataclass's time
    """`num_tokens` consecutive tokens of the request in KV slot `slot`, the first at `position`."""

    slot: int
    position: int
    num_tokens: int


Batch = Sequence[Segment]


def num_tokens(batch: Batch) -> int:
    """Total tokens of a step: the leading dimension of every tensor it carries."""
    return sum(segment.num_tokens for segment in batch)
