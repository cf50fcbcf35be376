"""The links between home and its machines: what each binds, and how both ends speak on it."""

import hashlib

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.errors import MessageError
from pipeline.machines.messages import (
    PIECE_BYTES,
    MachineMessage,
    Refused,
    decode_machine_message,
)
from pipeline.protocol.messages import MAX_CONTROL_BYTES, StrictMessage, encode_message
from pipeline.protocol.peer_connections import ORCHESTRATOR
from transport.attestation.key_only import AnyKeyVerifier, KeyOnlyAttester, KeyOnlyVerifier
from transport.channel import SecureChannel
from transport.errors import FrameError
from transport.handshake import Credentials, Link, LinkKind, Role, RoleKind
from transport.tensor_frames import DType, Frame, FrameKind, FrameLimits, Tensor, TensorSpec

MACHINE = Role(RoleKind.MACHINE, 0)
OTHER_MACHINE = Role(RoleKind.MACHINE, 1)
_KEYS_CONTEXT = b"veilpipe-machine-keys/1"


def _check_piece(header: bytes, specs: tuple[TensorSpec, ...]) -> None:
    """A message, or a piece of a part. Raises FrameError."""
    if specs and (header or specs[0].dtype is not DType.U8 or len(specs[0].shape) != 1):
        raise FrameError("neither a message nor a piece of a part")


LIMITS = FrameLimits(
    max_header_bytes=MAX_CONTROL_BYTES,
    max_tensors=1,
    max_tensor_bytes=PIECE_BYTES,
    check=_check_piece,
)


def pairing_link(machine: bytes) -> Link:
    """From whoever has the secret to the machine with this key."""
    return Link(LinkKind.PAIRING, ORCHESTRATOR, MACHINE, _digest(machine))


def provision_link(home: bytes, machine: bytes) -> Link:
    """From the home with the one key to the machine with the other."""
    return Link(LinkKind.PROVISION, ORCHESTRATOR, MACHINE, _digest(home, machine))


def probe_link(visitor: bytes, machine: bytes) -> Link:
    """From a machine to another, or to home in a machine's place."""
    return Link(LinkKind.PROBE, OTHER_MACHINE, MACHINE, _digest(visitor, machine))


def knowing(own: X25519PrivateKey, peer: bytes, psk: bytes | None = None) -> Credentials:
    """Shows our key, and demands exactly that of the peer."""
    return Credentials(own, KeyOnlyAttester(), (KeyOnlyVerifier(frozenset({peer})),), psk)


def offering(own: X25519PrivateKey, psk: bytes) -> Credentials:
    """Shows our key to whoever has the secret."""
    return Credentials(own, KeyOnlyAttester(), (AnyKeyVerifier(),), psk)


class MachineLink:
    """Messages and pieces of parts over a channel; one task at a time."""

    def __init__(self, channel: SecureChannel) -> None:
        self.channel = channel

    @property
    def peer_key(self) -> bytes:
        """The key that the peer has proved."""
        return self.channel.peer.static_key

    async def say(self, message: StrictMessage) -> None:
        """Send a message."""
        await self.channel.send(Frame(FrameKind.CONTROL, encode_message(message)))

    async def refuse(self, reason: str) -> None:
        """Send why something is not done."""
        await self.say(Refused(reason=reason[:1024]))

    async def hear(self) -> MachineMessage:
        """Receive a message. Raises MessageError for anything else."""
        frame = await self.channel.receive()
        if frame.tensors:
            raise MessageError("a piece of a part arrived where a message is expected")
        return decode_machine_message(frame.header)

    async def send_piece(self, data: bytes | memoryview) -> None:
        """Send up to PIECE_BYTES of a part."""
        piece = Tensor(TensorSpec(DType.U8, (len(data),)), memoryview(data))
        await self.channel.send(Frame(FrameKind.DATA, b"", (piece,)))

    async def receive_piece(self) -> memoryview:
        """Receive a piece, valid until the next call. Raises MessageError for anything else."""
        frame = await self.channel.receive()
        if len(frame.tensors) != 1 or not frame.tensors[0].data:
            raise MessageError("a message arrived where a piece of a part is expected")
        return frame.tensors[0].data


def _digest(*keys: bytes) -> bytes:
    return hashlib.sha256(_KEYS_CONTEXT + b"".join(keys)).digest()
