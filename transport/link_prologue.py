"""What both ends of a link must agree on before they speak."""

from enum import IntEnum
from struct import Struct

from transport.errors import MisuseError
from transport.frozen import frozen

VERSION = b"veilpipe/2"
PROTOCOL_NAME = "Noise_XX_25519_ChaChaPoly_SHA256"
MANIFEST_HASH_BYTES = 32
EPOCH_BYTES = 16
MAX_STAGE_IDX = 2**16 - 1  # far above any real pipeline; the prologue holds it in four bytes

_PROLOGUE_TAIL = Struct(">BBIBI")


class RoleKind(IntEnum):
    """What a party is."""

    ORCHESTRATOR = 1
    STAGE = 2
    MACHINE = 3  # whatever it runs; 0 is the one that is dialed, 1 another that dials it
    PART = 4  # a worker that a stage asks for a part of its layers' work


class LinkKind(IntEnum):
    """What a link carries."""

    CONTROL = 1
    DATA = 2
    PAIRING = 3  # bound to the machine's key, opened by a one-time secret
    PROVISION = 4  # bound to both ends' keys and to no manifest
    PROBE = 5  # between two machines, to see how far apart they are; bound to both keys
    RESULTS = 6  # the last stage's results, where the orchestrator comes for them


@frozen
class Role:
    """A party's place in the pipeline. Raises: MisuseError."""

    kind: RoleKind
    stage_idx: int = 0  # 0 for the orchestrator, and for a part

    def __post_init__(self) -> None:
        most = {RoleKind.STAGE: MAX_STAGE_IDX, RoleKind.MACHINE: 1}.get(self.kind, 0)
        if not 0 <= self.stage_idx <= most:
            raise MisuseError(f"stage index {self.stage_idx} is outside 0 to {most}")

    def canonical(self) -> bytes:
        """The name evidence is bound to: `orchestrator`, `part`, `stage/<index>`, `machine/0`."""
        name = self.kind.name.lower().encode()
        if self.kind in {RoleKind.ORCHESTRATOR, RoleKind.PART}:
            return name
        return b"%s/%d" % (name, self.stage_idx)


@frozen
class Link:
    """What both ends must agree on before they speak; all of it is in the Noise prologue.

    Raises: MisuseError on a field of the wrong length.
    """

    kind: LinkKind
    initiator: Role
    responder: Role
    manifest_hash: bytes  # SHA-256 of the manifest's core; without one, of what else is agreed on
    epoch: bytes = bytes(EPOCH_BYTES)  # separates pipeline sessions; zeros on control links

    def __post_init__(self) -> None:
        if len(self.manifest_hash) != MANIFEST_HASH_BYTES:
            raise MisuseError(f"a manifest hash has 32 bytes, not {len(self.manifest_hash)}")
        if len(self.epoch) != EPOCH_BYTES:
            raise MisuseError(f"an epoch has 16 bytes, not {len(self.epoch)}")
        if self.initiator == self.responder:
            # The two ends' evidence would be bound to the same role, and could be reflected.
            raise MisuseError(f"{self.initiator} cannot hold a link with itself")

    def prologue(self) -> bytes:
        """Return the fixed-length bytes that Noise binds."""
        tail = _PROLOGUE_TAIL.pack(
            self.kind,
            self.initiator.kind,
            self.initiator.stage_idx,
            self.responder.kind,
            self.responder.stage_idx,
        )
        return VERSION + PROTOCOL_NAME.encode() + self.manifest_hash + tail + self.epoch

    def __str__(self) -> str:
        """Name both ends and the manifest, for errors."""
        names = [role.canonical().decode() for role in (self.initiator, self.responder)]
        kind, manifest = self.kind.name.lower(), self.manifest_hash.hex()[:16]
        return f"{kind} link {names[0]} to {names[1]}, manifest {manifest}"
