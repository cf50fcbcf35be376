"""What evidence is bound to: this very handshake, this key, this role."""

import hashlib
import hmac
import struct
from collections.abc import Mapping
from enum import IntEnum

from transport.errors import MisuseError
from transport.frozen import frozen

USER_DATA_CONTEXT = b"veilpipe-attest/1"
HANDSHAKE_HASH_BYTES = 32
STATIC_KEY_BYTES = 32
NONCE_BYTES = 32
MAX_ROLE_BYTES = 255  # its length travels as one byte in the hashed user data

_ROLE_LENGTH = struct.Struct("!B")


class EvidenceKind(IntEnum):
    """How a party proves what it is. Which kinds a party accepts is its own policy."""

    KEY_ONLY = 1
    DEV = 2
    NITRO = 3


@frozen
class Binding:
    """What one piece of evidence is bound to; each side recomputes it from its own view.

    Raises: MisuseError on a field of the wrong length.
    """

    role: bytes  # canonical role of the prover, e.g. b"stage/1"
    handshake_hash: bytes  # Noise h, 32 bytes
    static_key: bytes  # the prover's X25519 static public key, 32 bytes
    nonce: bytes  # the verifier's ephemeral public key, 32 bytes

    def __post_init__(self) -> None:
        if not 0 < len(self.role) <= MAX_ROLE_BYTES:
            raise MisuseError(f"role has {len(self.role)} bytes, allowed: 1 to {MAX_ROLE_BYTES}")
        for name, value, num_bytes in (
            ("handshake_hash", self.handshake_hash, HANDSHAKE_HASH_BYTES),
            ("static_key", self.static_key, STATIC_KEY_BYTES),
            ("nonce", self.nonce, NONCE_BYTES),
        ):
            if len(value) != num_bytes:
                raise MisuseError(f"{name} has {len(value)} bytes, expected {num_bytes}")


@frozen
class Attested:
    """What a verifier vouches for once the evidence has passed every check."""

    kind: EvidenceKind
    measurements: Mapping[int, bytes]  # PCR index -> 48 bytes; empty for key-only


def user_data(binding: Binding) -> bytes:
    """SHA-384 over context, length-prefixed role and handshake hash (48 bytes).

    The prefix keeps role and hash apart, so that no other pair hashes to the same bytes.
    """
    prefixed_role = _ROLE_LENGTH.pack(len(binding.role)) + binding.role
    return hashlib.sha384(USER_DATA_CONTEXT + prefixed_role + binding.handshake_hash).digest()


def is_same(left: bytes, right: bytes) -> bool:
    """Constant-time equality, so that timing tells an attacker nothing of where bytes differ."""
    return hmac.compare_digest(left, right)
