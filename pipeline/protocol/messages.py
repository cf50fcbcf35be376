"""Control messages: what orchestrator and stages say to each other beside the data channels.

Msgpack maps, each checked against its type.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.agreement.manifest import MAX_STAGES
from pipeline.dtypes import Precision
from pipeline.errors import MessageError
from pipeline.protocol.step_header import MAX_SEGMENTS, PROTOCOL_VERSION
from pipeline.protocol.stored_state import (
    KEY_BYTES,
    MAX_SAVED_CHUNKS,
    ROOT_BYTES,
    SESSION_BYTES,
)

# Control messages are a few hundred bytes; an init with 32 measurements of two neighbours is 4 KB.
MAX_CONTROL_BYTES = 64 << 10

Count = Annotated[int, Field(ge=0, lt=1 << 64)]
Epoch = Annotated[bytes, Field(min_length=16, max_length=16)]
# Nobody can say it who has not been told it.
Name = Annotated[bytes, Field(min_length=16, max_length=16)]
# Tokens that each slot keeps.
Lengths = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_SEGMENTS)]
# Text of an endpoint, as `parse_endpoint` takes it.
Address = Annotated[str, Field(max_length=1024)]
Measurements = dict[
    Annotated[int, Field(ge=0, le=31)], Annotated[bytes, Field(min_length=48, max_length=48)]
]


class StrictMessage(BaseModel):
    """A message of exactly its fields, each of exactly its type."""

    # Checks are built for those kinds that are said: a session says few of them.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


AnyMessage = TypeVar("AnyMessage", bound=StrictMessage)


def kinds_of(union: object) -> Mapping[str, type[Any]]:
    """A union of messages, each by its type's name."""
    return {each.model_fields["type"].default: each for each in get_args(union)}


class Init(StrictMessage):
    """Orchestrator → stage, first on a control channel: what this session is, and its neighbours.

    The epoch is random, and said nowhere else: a data channel that binds it has at its other end
    somebody who was told of the same session by the same orchestrator.
    """

    type: Literal["init"] = "init"
    version: int = PROTOCOL_VERSION
    epoch: Epoch
    stage_idx: Annotated[int, Field(ge=0, lt=MAX_STAGES)]
    # A codec's name, as the manifest has it.
    activation_dtype: Annotated[str, Field(max_length=64)]
    hidden_dim: int
    max_seq_len: Annotated[int, Field(ge=1)]
    num_slots: Annotated[int, Field(ge=1, le=MAX_SEGMENTS)]
    max_step_tokens: Annotated[int, Field(ge=1, le=1 << 20)]
    # Of so many tokens a slot keeps `window`, the first `num_sinks` among them; 0: all.
    window: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    num_sinks: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    # What the slots of a worker before this one held, by its name, and how many tokens of each this
    # one is to go on from, if they outlived that worker; else it begins with none.
    kept: Name | None = None
    lengths: Lengths | None = None
    # Of the keys by which a stage is to encode what it keeps; None: it is to keep it as it is.
    seed: Annotated[bytes, Field(min_length=32, max_length=32)] | None = None
    # Where to dial; None, of the last stage: the orchestrator comes for the results.
    data_out: Address | None = None
    upstream_measurements: Measurements
    downstream_measurements: Measurements


class Ready(StrictMessage):
    """Stage → orchestrator: both data channels stand, steps may flow."""

    type: Literal["ready"] = "ready"
    epoch: Epoch
    stage_idx: int
    weight_bytes: int
    kv_bytes: int
    # Tokens that its slots may hold together; None: each as many as it has positions.
    kv_tokens: Count | None = None
    vocab_size: Annotated[int, Field(ge=1)]
    precision: Precision
    kernels: Annotated[str, Field(max_length=64)]
    num_threads: int
    device: Annotated[str, Field(max_length=64)]
    # Whether it can replay what it sent, should the stage behind it be replaced.
    keeps_activations: bool
    # Whether its rows are the same, bit for bit, in steps of any size.
    is_row_exact: bool
    # The name of what its slots hold, where that outlives its worker: a new one unless it goes on.
    kept: Name | None = None


class Waiting(StrictMessage):
    """Stage → orchestrator: not ready yet, and why, for the user to see."""

    type: Literal["waiting"] = "waiting"
    detail: Annotated[str, Field(max_length=1024)]


class Health(StrictMessage):
    """Orchestrator → stage: are you there?"""

    type: Literal["health"] = "health"
    sequence: int


class StageFigures(StrictMessage):
    """What a stage does now, and has done since its worker started; sizes and times, no content.

    Slots and KV are the session's; time and bytes are those of the data channels.
    """

    uptime_ns: Count
    num_slots: Count
    slots_in_use: Count
    kv_tokens: Count
    # What they may take at most.
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


class Healthy(StrictMessage):
    """Stage → orchestrator: the answer to `health`."""

    type: Literal["healthy"] = "healthy"
    sequence: int
    figures: StageFigures


class Start(StrictMessage):
    """Orchestrator → stage: a request now owns a slot. Its KV state follows the data channel."""

    type: Literal["start"] = "start"
    request_id: int
    slot: int


class Done(StrictMessage):
    """Orchestrator → stage: a request ended as it should."""

    type: Literal["done"] = "done"
    request_id: int


class Abort(StrictMessage):
    """Orchestrator → stage: a request was given up."""

    type: Literal["abort"] = "abort"
    request_id: int


class Broken(StrictMessage):
    """Stage → orchestrator: a data channel of this epoch broke; all KV state waits for `rewind`."""

    type: Literal["broken"] = "broken"
    epoch: Epoch
    side: Literal["upstream", "downstream"]
    detail: Annotated[str, Field(max_length=1024)]


class Rewind(StrictMessage):
    """Orchestrator → stage: go back to what is certain, and connect both neighbours afresh.

    `lengths` is what each slot keeps, in tokens. With `replay_until` the stages behind this one, up
    to that one, are new: send them the activations kept for those tokens. `data_out` is where to
    dial now: the stage behind may have come back elsewhere.
    """

    type: Literal["rewind"] = "rewind"
    epoch: Epoch
    lengths: Lengths
    data_out: Address | None = None
    replay_until: Annotated[int, Field(ge=1, lt=MAX_STAGES)] | None = None


class _StoreOrder(StrictMessage):
    """Which stored session an order is about, and where what is stored of it ends.

    The key is of this session and this stage alone, and the stage forgets it with the order.
    """

    type: Literal["save", "load"]
    # Chosen by the orchestrator: the answer names it.
    operation: Count
    slot: Annotated[int, Field(ge=0, lt=MAX_SEGMENTS)]
    session: Annotated[bytes, Field(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    key: Annotated[bytes, Field(min_length=KEY_BYTES, max_length=KEY_BYTES, repr=False)]
    epoch: Count
    # Chunks that are stored, and the end of the last; without one at 0, of no root.
    num_chunks: Count
    position: Count
    root: Annotated[bytes, Field(max_length=ROOT_BYTES)]


class Save(_StoreOrder):
    """Orchestrator → stage: store a slot's positions from where what is stored ends, to `end`."""

    type: Literal["save"] = "save"
    end: Annotated[int, Field(ge=1)]


class Load(_StoreOrder):
    """Orchestrator → stage: put the first `length` stored positions into an empty slot."""

    type: Literal["load"] = "load"
    length: Annotated[int, Field(ge=1)]


class Saved(StrictMessage):
    """Stage → orchestrator: done; where each new chunk ends, and its root."""

    type: Literal["saved"] = "saved"
    operation: Count
    positions: Annotated[list[Count], Field(max_length=MAX_SAVED_CHUNKS)]
    roots: Annotated[
        list[Annotated[bytes, Field(min_length=ROOT_BYTES, max_length=ROOT_BYTES)]],
        Field(max_length=MAX_SAVED_CHUNKS),
    ]


class Loaded(StrictMessage):
    """Stage → orchestrator: the slot holds them."""

    type: Literal["loaded"] = "loaded"
    operation: Count


class NotStored(StrictMessage):
    """Stage → orchestrator: an order to save or load failed; a slot to be loaded is empty.

    With `is_void` what is stored cannot be used by anybody again; otherwise the store fails.
    """

    type: Literal["not_stored"] = "not_stored"
    operation: Count
    is_void: bool
    detail: Annotated[str, Field(max_length=1024)]


class Failure(StrictMessage):
    """Stage → orchestrator: the session is over. `detail` never holds prompt or activation.

    "refused": it would be over again, however often it is asked for. "failed": something went
    wrong in it. "busy": another one is under way. "leaving": the worker has been told to stop.
    """

    type: Literal["error"] = "error"
    code: Literal["busy", "refused", "failed", "leaving"]
    detail: Annotated[str, Field(max_length=1024)]


class Shutdown(StrictMessage):
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
    | Save
    | Load
    | Saved
    | Loaded
    | NotStored
    | Failure
    | Shutdown
)
_KINDS: Mapping[str, type[Message]] = kinds_of(Message)


def encode_message(message: StrictMessage) -> bytes:
    """Msgpack of a control message."""
    packed: bytes = msgpack.packb(message.model_dump(exclude_none=True))
    return packed


def decode_message(data: bytes) -> Message:
    """Decode a control message. Raises MessageError for anything a peer could send instead."""
    return decode_as(_KINDS, data)


def decode_as(kinds: Mapping[str, type[AnyMessage]], data: bytes) -> AnyMessage:
    """Decode one of a union of messages. Raises: as `decode_message`."""
    if len(data) > MAX_CONTROL_BYTES:
        raise MessageError(
            f"control message of {len(data)} bytes, the limit is {MAX_CONTROL_BYTES}"
        )
    try:
        raw = msgpack.unpackb(data, strict_map_key=False, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise MessageError("control message is not msgpack") from error
    name = raw.get("type") if isinstance(raw, dict) else None
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise MessageError("control message does not fit any known type")
    try:
        return kind.model_validate(raw)
    except (ValidationError, RecursionError) as error:
        raise MessageError("control message does not fit its type") from error
