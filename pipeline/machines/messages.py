"""What home and its machines say to each other: strict msgpack maps, as control messages are."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from pipeline.agreement.manifest import MAX_STAGES
from pipeline.protocol.messages import Address, Count, StrictMessage, decode_as, kinds_of

# A list of so many fits a control message; of more, the rest is seen when some are removed.
MAX_PARTS = 400
# A part's bytes travel in pieces of this size.
PIECE_BYTES = 1 << 20
# So much is sent before the machine is heard again: a refusal is heard that soon.
WINDOW_BYTES = 32 * PIECE_BYTES

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[bytes, Field(min_length=32, max_length=32)]
Text = Annotated[str, Field(max_length=1024)]
Software = Annotated[str, Field(max_length=64)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Join(StrictMessage):
    """Home → machine, on a pairing link: may I? Its key is the one the handshake has shown."""

    type: Literal["join"] = "join"
    software: Software


class Joined(StrictMessage):
    """Machine → home: from now on our keys know each other."""

    type: Literal["joined"] = "joined"


class Refused(StrictMessage):
    """Machine → home: not done, and why."""

    type: Literal["refused"] = "refused"
    reason: Text


class Describe(StrictMessage):
    """Home → machine: what are you, for a model with heads of this size?"""

    type: Literal["describe"] = "describe"
    head_dim: Annotated[int, Field(ge=1, le=1 << 16)]


class Description(StrictMessage):
    """What a machine has. Bytes are those that it would give."""

    type: Literal["description"] = "description"
    software: Software
    cores: Annotated[int, Field(ge=1, le=1 << 16)]
    memory_bytes: Count
    disk_bytes: Count
    kernels: Annotated[str, Field(max_length=64)]


class Measure(StrictMessage):
    """Home → machine: how fast are you? Takes about a second."""

    type: Literal["measure"] = "measure"


class Measured(StrictMessage):
    """Weights read, and multiply-adds done on them, a second."""

    type: Literal["measured"] = "measured"
    bytes_per_second: Positive
    flops: Positive


class Admit(StrictMessage):
    """Home → machine: the machine with this key may come by and see how far it is."""

    type: Literal["admit"] = "admit"
    key: Key


class Probe(StrictMessage):
    """Home → machine: see how far that one is. `data_in`: whether that is reached, too."""

    type: Literal["probe"] = "probe"
    address: Address
    key: Key
    data_in: Address | None = None


class Probed(StrictMessage):
    """How far another machine is: a round trip, and what goes through in a second."""

    type: Literal["probed"] = "probed"
    round_trip_seconds: Positive
    bytes_per_second: Positive


class Listing(StrictMessage):
    """Home → machine: which parts have you?"""

    type: Literal["list"] = "list"


class Part(StrictMessage):
    """A part that lies there whole; whether the stage that is served needs it."""

    type: Literal["part"] = "part"
    digest: Digest
    num_bytes: Count
    is_used: bool


class Parts(StrictMessage):
    """Machine → home: those that lie there."""

    type: Literal["parts"] = "parts"
    parts: Annotated[list[Part], Field(max_length=MAX_PARTS)]


class Put(StrictMessage):
    """Home → machine: here comes a part of so many bytes."""

    type: Literal["put"] = "put"
    digest: Digest
    num_bytes: Annotated[int, Field(ge=1, lt=1 << 50)]


class GoOn(StrictMessage):
    """Machine → home: send what comes from this byte on; all of them: it is there."""

    type: Literal["go_on"] = "go_on"
    offset: Count


class Remove(StrictMessage):
    """Home → machine: I need these no more."""

    type: Literal["remove"] = "remove"
    digests: Annotated[list[Digest], Field(max_length=MAX_PARTS)]


class Serve(StrictMessage):
    """Home → machine: serve this stage of the manifest whose text is the part `manifest`."""

    type: Literal["serve"] = "serve"
    manifest: Digest
    stage_idx: Annotated[int, Field(ge=0, lt=MAX_STAGES)]


class Retire(StrictMessage):
    """Home → machine: serve nothing more of mine."""

    type: Literal["retire"] = "retire"


class Fine(StrictMessage):
    """It is done."""

    type: Literal["fine"] = "fine"


class Ping(StrictMessage):
    """Machine → machine, to be answered with `fine` at once."""

    type: Literal["ping"] = "ping"


class Flood(StrictMessage):
    """Machine → machine: so many pieces follow; `fine` when all are there."""

    type: Literal["flood"] = "flood"
    num_pieces: Annotated[int, Field(ge=1, le=1 << 16)]


MachineMessage = (
    Join
    | Joined
    | Refused
    | Describe
    | Description
    | Measure
    | Measured
    | Admit
    | Probe
    | Probed
    | Listing
    | Parts
    | Put
    | GoOn
    | Remove
    | Serve
    | Retire
    | Fine
    | Ping
    | Flood
)
_KINDS: Mapping[str, type[MachineMessage]] = kinds_of(MachineMessage)


def decode_machine_message(data: bytes) -> MachineMessage:
    """Raises MessageError for anything a peer could send instead."""
    return decode_as(_KINDS, data)
