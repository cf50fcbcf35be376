"""What a stage asks of whoever holds its encoded keys and values, field by field.

A question starts with what it is:

    OPEN      layers, KV heads, width, slots, rows of a slot: what the session may come to hold
    ATTEND    layer, number of segments, and of each: slot, rows it holds, new rows, rows that its
              queries see, queries. Tensors: new keys, new values, queries, F32 [KV heads, rows of
              all segments, width] each, queries perhaps F64. Answered with outputs of the queries'
              shape and F64 log-sums [KV heads, queries].
    TRUNCATE  slot, rows: what it keeps, in every layer
    FETCH     slot, layer. Answered with keys and values, F32 [KV heads, rows, width].
"""

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from transport.tensor_frames import FrameLimits

# Of one step at most: rows of 4,096 tokens of the widest models there are, of one layer.
MAX_BYTES = 1 << 30
_OP = Struct(">B")
_OPEN = Struct(">BIIIII")
_ATTEND = Struct(">BII")
_SEGMENT = Struct(">IIIII")
_PAIR = Struct(">BII")
QUESTION_LIMITS = FrameLimits(64 << 10, 3, MAX_BYTES)
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
    """One slot's part of a question; `num_held` rows are there before the new ones."""

    slot: int
    num_held: int
    num_new: int
    num_seen: int
    num_queries: int


def opening_bytes(opening: Opening) -> bytes:
    """The header of OPEN."""
    return _OPEN.pack(Op.OPEN, *opening)


def attend_bytes(layer: int, spans: Sequence[Span]) -> bytes:
    """The header of ATTEND."""
    head = _ATTEND.pack(Op.ATTEND, layer, len(spans))
    return head + b"".join(_SEGMENT.pack(*span) for span in spans)


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
    rest = memoryview(header)[_ATTEND.size :]
    if len(rest) != count * _SEGMENT.size:
        raise ValueError("a question with other segments than it says")
    return layer, [Span(*fields) for fields in _SEGMENT.iter_unpack(rest)]


def pair_untrusted(header: bytes) -> tuple[int, int]:
    """The fields of TRUNCATE and FETCH. Raises ValueError."""
    if len(header) != _PAIR.size:
        raise ValueError("a question of another length")
    _, first, second = _PAIR.unpack(header)
    return first, second
