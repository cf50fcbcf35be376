"""Evidence that a worker of the right core made the key that grants are sealed to.

It is what stages show in a handshake, bound to the key and to the client's nonce instead.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.doors.grants import DOMAIN, KEY_BYTES
from pipeline.doors.messages import (
    AttestResponse,
    DoorError,
    DoorFault,
    InferRequest,
)
from pipeline.errors import SessionError
from transport.attestation.evidence_binding import NONCE_BYTES, Binding, is_same
from transport.attestation.interfaces import Attester, Verifier
from transport.errors import AttestationError, DeviceError

# Not a stage's: its evidence of a handshake is none of a door's key, nor the other way round.
ROLE = b"door"


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A door's public key whose evidence has passed every check: what alone is sealed to."""

    public_key: bytes


def show_key(
    public_key: bytes, core_hash: bytes, nonce: bytes, attester: Attester
) -> AttestResponse:
    """A door's key with fresh evidence. Raises DoorError for another nonce than one of 32 bytes."""
    if len(nonce) != NONCE_BYTES:
        detail = f"nonce has {len(nonce)} bytes, expected {NONCE_BYTES}"
        raise DoorError(DoorFault.INVALID, detail)
    try:
        evidence = attester.attest(_binding(public_key, core_hash, nonce))
    except DeviceError as error:
        raise DoorError(DoorFault.UNAVAILABLE, "the door's security module fails") from error
    return AttestResponse(public_key, core_hash, attester.kind.name.lower(), evidence)


def verify_key(
    shown: AttestResponse, core_hash: bytes, nonce: bytes, verifiers: Sequence[Verifier]
) -> TrustedKey:
    """Judge a door's evidence under local policy. Raises SessionError naming what is wrong."""
    if not is_same(shown.core_hash, core_hash):
        raise SessionError("the door serves another manifest than this one")
    if len(shown.public_key) != KEY_BYTES:
        raise SessionError(f"the door shows a key of {len(shown.public_key)} bytes")
    # Which kinds count is decided here alone: a door cannot choose a weaker one.
    for verifier in verifiers:
        if verifier.kind.name.lower() == shown.evidence_kind:
            break
    else:
        known = ", ".join(each.kind.name.lower() for each in verifiers)
        raise SessionError(f"the door shows {shown.evidence_kind[:40]!r} evidence, not {known}")
    try:
        verifier.verify(shown.evidence, _binding(shown.public_key, core_hash, nonce))
    except AttestationError as error:
        raise SessionError(f"the door's evidence is refused: {error}") from error
    return TrustedKey(shown.public_key)


def wrong_key_nonce(request: InferRequest) -> bytes:
    """The nonce of the evidence that comes with WRONG_KEY.

    The grant is as fresh as a nonce would be: nobody knows it before its client has made it.
    """
    return hashlib.sha256(DOMAIN + b" wrong key" + bytes(request.encrypted_session_key)).digest()


def _binding(public_key: bytes, core_hash: bytes, nonce: bytes) -> Binding:
    digest = hashlib.sha256(DOMAIN + core_hash + public_key + nonce).digest()
    return Binding(ROLE, digest, public_key, nonce)
