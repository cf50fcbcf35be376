"""The header of a step: fixed structs, too small to be seen beside a token's compute time."""

from enum import IntEnum
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

from pipeline.agreement.manifest import MAX_STAGES
from pipeline.errors import MessageError
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want, want_from_wire

# Of control messages and step headers.
PROTOCOL_VERSION = 5
MAX_SEGMENTS = 1024


class StepKind(IntEnum):
    """What a data frame asks of a stage."""

    STEP = 1
    # With a U32 tensor of shape [0]: the named slots keep the tokens before their segment's
    # position, and at 0 none: nothing of a request is left for the next.
    TRUNCATE = 2
    # A step of before, for stages that have replaced lost ones: rebuilds KV state, has no result.
    REPLAY = 3
    # With such a tensor as well: segments in pairs. The first tokens of one slot, whose keys and
    # values are copied, and those of another, which holds nothing yet.
    COPY = 4


# Tuples: they are made for every token, in a third of a frozen dataclass's time.
class StageTiming(NamedTuple):
    """One stage's share of a step, nanoseconds: compute, ChaCha20-Poly1305, socket calls."""

    compute_ns: int
    crypto_ns: int
    wire_ns: int


class StepHeader(NamedTuple):
    """The authenticated header of a data frame; `timings` grows by one at every stage."""

    kind: StepKind
    step: int
    segments: tuple[Segment, ...]
    wants: tuple[Want, ...]
    timings: tuple[StageTiming, ...] = ()
    # The stage where a replay ends; 0 for every other kind.
    until: int = 0

    @property
    def carries_tokens(self) -> bool:
        """Whether rows travel with it; what only moves state has a tensor of shape [0]."""
        return self.kind is StepKind.STEP or self.kind is StepKind.REPLAY

    @property
    def num_tokens(self) -> int:
        """Tokens that its segments name: of a step that carries them the rows of its tensor."""
        return sum(segment.num_tokens for segment in self.segments)

    def with_timing(self, timing: StageTiming) -> "StepHeader":
        """This header with one more stage's timing."""
        return self._replace(timings=(*self.timings, timing))


# version u8 | kind u8 | segments u16 | timings u16 | until u16 | step u64
_HEAD = Struct("<BBHHHQ")
# slot u16 | ids u16 | position u32 | tokens u32 | result u8 | top u8 | rows u16
_SEGMENT = "HHIIBBH"
# compute ns u64 | crypto ns u64 | wire ns u64
_TIMING = "QQQ"
_SEGMENT_BYTES = Struct(f"<{_SEGMENT}").size
TIMING_BYTES = Struct(f"<{_TIMING}").size
_NUM_HEAD_FIELDS = len(_HEAD.unpack(bytes(_HEAD.size)))
# Members of an enumeration are slow to look up by calling it.
_KINDS = {int(kind): kind for kind in StepKind}
_NUM_SEGMENT_FIELDS = len(_SEGMENT)


@lru_cache(maxsize=64)
def _layout(num_segments: int, num_timings: int) -> Struct:
    return Struct(f"{_HEAD.format}{_SEGMENT * num_segments}{_TIMING * num_timings}")


def encode_step(header: StepHeader) -> bytes:
    """Pack a step header."""
    kind, step, segments, wants, timings, until = header
    fields = [PROTOCOL_VERSION, kind, len(segments), len(timings), until, step]
    for (slot, position, num_tokens), (result, rows, top, num_ids) in zip(
        segments, wants, strict=True
    ):
        fields += (slot, num_ids, position, num_tokens, result, top, rows)
    for timing in timings:
        fields += timing
    return _layout(len(segments), len(timings)).pack(*fields)


def decode_step(data: bytes) -> StepHeader:
    """Unpack a step header. Raises MessageError for anything a peer could send instead."""
    if len(data) < _HEAD.size:
        raise MessageError(f"step header of {len(data)} bytes, expected at least {_HEAD.size}")
    version, number, num_segments, num_timings, until, step = _HEAD.unpack_from(data)
    expected = _HEAD.size + num_segments * _SEGMENT_BYTES + num_timings * TIMING_BYTES
    kind = _KINDS.get(number)
    if version != PROTOCOL_VERSION or kind is None or (until and kind is not StepKind.REPLAY):
        raise MessageError(
            f"step header of version {version} and kind {number} until stage {until}, "
            f"expected version {PROTOCOL_VERSION}"
        )
    if num_segments > MAX_SEGMENTS or num_timings > MAX_STAGES or len(data) != expected:
        raise MessageError(
            f"step header of {len(data)} bytes with {num_segments} segments and "
            f"{num_timings} timings, expected {expected} bytes"
        )
    fields = _layout(num_segments, num_timings).unpack(data)
    ends = _NUM_HEAD_FIELDS + _NUM_SEGMENT_FIELDS * num_segments
    segments, wants = [], []
    for at in range(_NUM_HEAD_FIELDS, ends, _NUM_SEGMENT_FIELDS):
        slot, num_ids, position, num_tokens, result, top, rows = fields[
            at : at + _NUM_SEGMENT_FIELDS
        ]
        segments.append(Segment(slot, position, num_tokens))
        wants.append(want_from_wire(result, rows, top, num_ids))
    timings = tuple([StageTiming._make(fields[at : at + 3]) for at in range(ends, len(fields), 3)])
    return StepHeader(kind, step, tuple(segments), tuple(wants), timings, until)
