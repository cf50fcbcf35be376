"""Control messages and step headers: what orchestrator and stages say to each other.

Control messages are msgpack maps on the control channel. Step headers are fixed structs on the
data channels, small enough not to be seen beside a token's compute time.
"""

from enum import IntEnum
from functools import lru_cache
from struct import Struct
from typing import Annotated, Literal, NamedTuple

import msgpack
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.agreement.manifest import MAX_STAGES
from pipeline.errors import MessageError
from pipeline.protocol.segments import Segment
from pipeline.protocol.wants import Want, want_from_wire

PROTOCOL_VERSION = 3
# Control messages are a few hundred bytes; an init with 32 measurements of two neighbours is 4 KB.
MAX_CONTROL_BYTES = 64 << 10
MAX_SEGMENTS = 1024

Epoch = Annotated[bytes, Field(min_length=16, max_length=16)]
Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Measurements = dict[
    Annotated[int, Field(ge=0, le=31)], Annotated[bytes, Field(min_length=48, max_length=48)]
]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Init(_Message):
    """Orchestrator → stage, first on a control channel: what this session's data channels bind."""

    type: Literal["init"] = "init"
    version: int = PROTOCOL_VERSION
    epoch: Epoch
    manifest_hash: Digest
    stage_idx: Annotated[int, Field(ge=0, lt=MAX_STAGES)]
    # A codec's name, as the manifest has it.
    activation_dtype: Annotated[str, Field(max_length=64)]
    hidden_dim: int
    max_seq_len: Annotated[int, Field(ge=1)]
    num_slots: Annotated[int, Field(ge=1, le=MAX_SEGMENTS)]
    max_step_tokens: Annotated[int, Field(ge=1, le=1 << 20)]
    data_out: Annotated[str, Field(max_length=1024)]
    upstream_measurements: Measurements
    downstream_measurements: Measurements


class Ready(_Message):
    """Stage → orchestrator: both data channels stand, steps may flow."""

    type: Literal["ready"] = "ready"
    epoch: Epoch
    stage_idx: int
    weight_bytes: int
    kv_bytes: int
    vocab_size: Annotated[int, Field(ge=1)]
    precision: Literal["float32", "bfloat16", "int8"]
    kernels: Annotated[str, Field(max_length=64)]
    num_threads: int
    device: Annotated[str, Field(max_length=64)]
    # Whether it can replay what it sent, should the stage behind it be replaced.
    keeps_activations: bool
    # Whether its rows are the same, bit for bit, in steps of any size.
    is_row_exact: bool


class Waiting(_Message):
    """Stage → orchestrator: not ready yet, and why, for the user to see."""

    type: Literal["waiting"] = "waiting"
    detail: Annotated[str, Field(max_length=1024)]


class Health(_Message):
    """Orchestrator → stage: are you there?"""

    type: Literal["health"] = "health"
    sequence: int


Count = Annotated[int, Field(ge=0, lt=1 << 64)]


class StageFigures(_Message):
    """What a stage does now, and has done since its worker started; sizes and times, no content.

    Slots and KV are the session's; time and bytes are those of the data channels.
    """

    uptime_ns: Count
    num_slots: Count
    slots_in_use: Count
    kv_tokens: Count
    # Reserved, whether touched yet or not.
    kv_bytes: Count
    num_steps: Count
    num_tokens: Count
    # Requests in the last step.
    last_batch: Count
    compute_ns: Count
    crypto_ns: Count
    wire_ns: Count
    bytes_sent: Count
    bytes_received: Count
    # Completed ones, of control and data channels.
    num_handshakes: Count
    num_rekeys: Count


class Healthy(_Message):
    """Stage → orchestrator: the answer to `health`."""

    type: Literal["healthy"] = "healthy"
    sequence: int
    figures: StageFigures


class Start(_Message):
    """Orchestrator → stage: a request now owns a slot. Its KV state follows the data channel."""

    type: Literal["start"] = "start"
    request_id: int
    slot: int


class Done(_Message):
    """Orchestrator → stage: a request ended as it should."""

    type: Literal["done"] = "done"
    request_id: int


class Abort(_Message):
    """Orchestrator → stage: a request was given up."""

    type: Literal["abort"] = "abort"
    request_id: int


class Broken(_Message):
    """Stage → orchestrator: a data channel of this epoch broke; all KV state waits for `rewind`."""

    type: Literal["broken"] = "broken"
    epoch: Epoch
    side: Literal["upstream", "downstream"]
    detail: Annotated[str, Field(max_length=1024)]


class Rewind(_Message):
    """Orchestrator → stage: go back to what is certain, and connect both neighbours afresh.

    `lengths` is what each slot keeps, in tokens. With `replay_until` the stages behind this one, up
    to that one, are new: send them the activations kept for those tokens.
    """

    type: Literal["rewind"] = "rewind"
    epoch: Epoch
    lengths: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_SEGMENTS)
    ]
    replay_until: Annotated[int, Field(ge=1, lt=MAX_STAGES)] | None = None


class Failure(_Message):
    """Stage → orchestrator: the session is over. `detail` never holds prompt or activation."""

    type: Literal["error"] = "error"
    code: Literal["busy", "refused"]
    detail: Annotated[str, Field(max_length=1024)]


class Shutdown(_Message):
    """Orchestrator → stage: the session is over."""

    type: Literal["shutdown"] = "shutdown"


Message = (
    Init
    | Ready
    | Waiting
    | Health
    | Healthy
    | Start
    | Done
    | Abort
    | Broken
    | Rewind
    | Failure
    | Shutdown
)
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def encode_message(message: Message) -> bytes:
    """Msgpack of a control message."""
    packed: bytes = msgpack.packb(message.model_dump())
    return packed


def decode_message(data: bytes) -> Message:
    """Decode a control message. Raises MessageError for anything a peer could send instead."""
    if len(data) > MAX_CONTROL_BYTES:
        raise MessageError(
            f"control message of {len(data)} bytes, the limit is {MAX_CONTROL_BYTES}"
        )
    try:
        raw = msgpack.unpackb(data, strict_map_key=False, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise MessageError("control message is not msgpack") from error
    try:
        return _ADAPTER.validate_python(raw)
    except (ValidationError, RecursionError) as error:
        raise MessageError("control message does not fit any known type") from error


class StepKind(IntEnum):
    """What a data frame asks of a stage."""

    STEP = 1
    # With a U32 tensor of shape [0]: the named slots keep the tokens before their segment's
    # position, and at 0 none: nothing of a request is left for the next.
    TRUNCATE = 2
    # A step of before, for stages that have replaced lost ones: rebuilds KV state, has no result.
    REPLAY = 3


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
    def num_tokens(self) -> int:
        """Tokens in this step: the leading dimension of its tensor."""
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
