"""What a stage asks of whoever holds its encoded keys and values, field by field.

A question starts with what it is:

    OPEN      layers, KV heads, width, slots, rows of a slot: what the session may come to hold
    ATTEND    layer, number of slots, and of each: slot, rows it holds (0 starts it anew), new rows,
              queries, number of segments of the rows that these see, and where each ends: a query
              comes once for each. Tensors: new keys, new values, queries, F32 [KV heads, rows of
              all slots, width] each, queries perhaps F64. Answered with outputs of the queries'
              shape and F64 log-sums [KV heads, queries].
    TRUNCATE  slot, rows: what it keeps, in every layer
    FETCH     slot, layer. Answered with keys and values, F32 [KV heads, rows, width].
"""

from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from struct import Struct
from typing import NamedTuple

from transport.tensor_frames import FrameLimits

# Of one step at most: a few hundred slots with as many segments as `attention_parts` lets them get.
MAX_HEADER_BYTES = 64 << 10
# And rows of 4,096 tokens of the widest models there are, of one layer.
MAX_BYTES = 1 << 30
_OP = Struct(">B")
_OPEN = Struct(">BIIIII")
_ATTEND = Struct(">BII")
_SPAN = Struct(">IIIII")
_STOP = Struct(">I")
_PAIR = Struct(">BII")
QUESTION_LIMITS = FrameLimits(MAX_HEADER_BYTES, 3, MAX_BYTES)
ANSWER_LIMITS = FrameLimits(2048, 2, MAX_BYTES)


class Op(IntEnum):
    """What is asked."""

    OPEN = 1
    ATTEND = 2
    TRUNCATE = 3
    FETCH = 4


class Opening(NamedTuple):
    """What a session may come to hold."""

    num_layers: int
    num_kv_heads: int
    width: int
    num_slots: int
    max_rows: int

    @property
    def num_bytes(self) -> int:
        """Of keys and values in float32."""
        rows = self.num_layers * self.num_slots * self.max_rows
        return 2 * 4 * rows * self.num_kv_heads * self.width


class Span(NamedTuple):
    """One slot's part of a question; `num_held` rows are there before the new ones.

    stops: where each segment ends of the rows that its queries see, the first of which starts at 0.
    """

    slot: int
    num_held: int
    num_new: int
    num_queries: int
    stops: tuple[int, ...] = ()

    @property
    def num_asked(self) -> int:
        """Rows of queries: one for each query and segment."""
        return self.num_queries * len(self.stops)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Start and end of each."""
        return list(pairwise((0, *self.stops)))


def opening_bytes(opening: Opening) -> bytes:
    """The header of OPEN."""
    return _OPEN.pack(Op.OPEN, *opening)


def attend_bytes(layer: int, spans: Sequence[Span]) -> bytes:
    """The header of ATTEND."""
    head = _ATTEND.pack(Op.ATTEND, layer, len(spans))
    return head + b"".join(
        _SPAN.pack(*span[:-1], len(span.stops)) + b"".join(map(_STOP.pack, span.stops))
        for span in spans
    )


def pair_bytes(op: Op, first: int, second: int) -> bytes:
    """The header of TRUNCATE and FETCH."""
    return _PAIR.pack(op, first, second)


def op_untrusted(header: bytes) -> Op:
    """What is asked. Raises ValueError."""
    if not header:
        raise ValueError("an empty question")
    return Op(header[0])


def opening_untrusted(header: bytes) -> Opening:
    """The fields of OPEN. Raises ValueError."""
    if len(header) != _OPEN.size:
        raise ValueError("an opening of another length")
    return Opening(*_OPEN.unpack(header)[1:])


def attend_untrusted(header: bytes) -> tuple[int, list[Span]]:
    """The fields of ATTEND. Raises ValueError."""
    if len(header) < _ATTEND.size:
        raise ValueError("a question that is too short")
    _, layer, count = _ATTEND.unpack_from(header)
    at, spans = _ATTEND.size, []
    for _ in range(count):
        if len(header) < at + _SPAN.size:
            raise ValueError("a question with fewer slots than it says")
        slot, num_held, num_new, num_queries, num_stops = _SPAN.unpack_from(header, at)
        at += _SPAN.size
        stops = header[at : at + num_stops * _STOP.size]
        if len(stops) != num_stops * _STOP.size:
            raise ValueError("a question with fewer segments than it says")
        at += len(stops)
        ends = tuple(stop for (stop,) in _STOP.iter_unpack(stops))
        spans.append(Span(slot, num_held, num_new, num_queries, ends))
    if at != len(header):
        raise ValueError("a question with more than it says")
    return layer, spans


def pair_untrusted(header: bytes) -> tuple[int, int]:
    """The fields of TRUNCATE and FETCH. Raises ValueError."""
    if len(header) != _PAIR.size:
        raise ValueError("a question of another length")
    _, first, second = _PAIR.unpack(header)
    return first, second
