"""What a client seals to a door: the key of a session, and how it is sealed.

A grant is HPKE base mode (RFC 9180) with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and AES-256-GCM;
`info` binds protocol, manifest and session, so that no grant is of use in another.
"""

import hashlib
import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.doors.messages import DoorError, DoorFault, Payload

DOMAIN = b"veilpipe-door/1"
SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
KEY_BYTES = 32
# Says which key a grant is sealed to: another worker's is told apart from a damaged grant.
KEY_ID_BYTES = 8
_HPKE_BYTES = KEY_BYTES + 16  # the encapsulated key before, the tag behind
# With the session's key alone, or with the secret of its store as well.
_GRANT_BYTES = (KEY_BYTES, 2 * KEY_BYTES)
SEALED_BYTES = tuple(KEY_ID_BYTES + _HPKE_BYTES + num_bytes for num_bytes in _GRANT_BYTES)


@dataclass(frozen=True, slots=True, repr=False)
class Grant:
    """A session's key, 32 bytes of its client, and who owns it: 32 bytes that outlive the key.

    Whoever has the owner's may begin the session anew under another key, and reads what is stored
    of it.
    """

    session_key: bytes
    owner: bytes

    @classmethod
    def fresh(cls, owner: bytes) -> "Grant":
        """A new key of the same owner."""
        return cls(os.urandom(KEY_BYTES), owner)

    @classmethod
    def parse(cls, plain: bytes) -> "Grant":
        """The key alone, as older clients seal it, is its own owner. Raises ValueError."""
        if len(plain) not in _GRANT_BYTES:
            raise ValueError(f"a grant has {_GRANT_BYTES} bytes, not {len(plain)}")
        key = plain[:KEY_BYTES]
        return cls(key, plain[KEY_BYTES:] or derive(key, b"owner"))

    def seal(self, public_key: bytes, info: bytes) -> bytes:
        """Key id, encapsulated key, ciphertext and tag. Raises ValueError for no X25519 key."""
        key = X25519PublicKey.from_public_bytes(public_key)
        return key_id(public_key) + SUITE.encrypt(self.session_key + self.owner, key, info)


def derive(secret: bytes, purpose: bytes) -> bytes:
    """32 bytes for one purpose."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=DOMAIN + b" " + purpose).derive(secret)


def key_id(public_key: bytes) -> bytes:
    """Names a door's key in front of what is sealed to it."""
    return hashlib.sha256(public_key).digest()[:KEY_ID_BYTES]


def grant_info(core_hash: bytes, session_id: str) -> bytes:
    """What a grant is bound to."""
    return DOMAIN + b" grant" + core_hash + session_id.encode()


def open_grant(sealed: Payload, key: X25519PrivateKey, info: bytes) -> Grant:
    """A grant whose key id is this key's. Raises DoorError."""
    try:
        return Grant.parse(SUITE.decrypt(bytes(sealed)[KEY_ID_BYTES:], key, info))
    except (InvalidTag, ValueError) as error:
        raise _refused() from error


def open_older_grant(sealed: Payload, key: RSAPrivateKey) -> Grant:
    """A grant under RSA-OAEP with SHA-256, which is bound to nothing. Raises DoorError."""
    try:
        return Grant.parse(key.decrypt(bytes(sealed), OAEP(MGF1(SHA256()), SHA256(), None)))
    except ValueError as error:
        raise _refused() from error


def _refused() -> DoorError:
    return DoorError(DoorFault.UNAUTHENTIC, "encrypted_session_key does not open")
