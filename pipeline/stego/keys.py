"""From what both ends know to the keys of one message."""

from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.stego.errors import StegoError

SALT_BYTES = 16
SECRET_BYTES = 32
_KEY_BYTES = 32
_MASK_BYTES = 4
# RFC 9106, section 4: the second recommended option, for where 2 GiB are too much.
_ARGON2_PASSES = 3
_ARGON2_LANES = 4
_ARGON2_KIB = 64 << 10
_DOMAIN = b"veilpipe stego/1"


@dataclass(frozen=True, slots=True)
class MessageKeys:
    """One message's own, each used for one thing: sealing, coupling, masking, drawing the tail."""

    seal: bytes = field(repr=False)
    codec: bytes = field(repr=False)
    mask: bytes = field(repr=False)
    tail: bytes = field(repr=False)


class KeySource(Protocol):
    """Whoever can say the keys of a message."""

    def keys(self, salt: bytes) -> MessageKeys:
        """The keys of the message with this salt. Raises StegoError."""
        ...


@dataclass(frozen=True, slots=True)
class Secret:
    """What both ends know: the 32 bytes of a secret file, a passphrase, or both. Raises StegoError.

    Attack: a passphrase is guessed at leisure, hence Argon2id, salted anew for each message.
    """

    key: bytes = field(default=b"", repr=False)
    passphrase: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        """Refuse a secret that is none."""
        if not self.key and not self.passphrase:
            raise StegoError("there is no secret; give a secret file or a passphrase")
        if len(self.key) not in (0, SECRET_BYTES):
            raise StegoError(f"a secret has {SECRET_BYTES} bytes; this one has {len(self.key)}")

    def keys(self, salt: bytes) -> MessageKeys:
        """The keys of the message with this salt, 16 bytes; a passphrase takes its time."""
        stretched = b""
        if self.passphrase:
            stretched = Argon2id(
                salt=salt,
                length=_KEY_BYTES,
                iterations=_ARGON2_PASSES,
                lanes=_ARGON2_LANES,
                memory_cost=_ARGON2_KIB,
            ).derive(self.passphrase)
        kinds = bytes([bool(self.key), bool(self.passphrase)])
        num_bytes = 3 * _KEY_BYTES + _MASK_BYTES
        derived = HKDF(SHA256(), num_bytes, salt, _DOMAIN + kinds).derive(self.key + stretched)
        seal, codec, tail = (derived[i : i + _KEY_BYTES] for i in (0, _KEY_BYTES, 2 * _KEY_BYTES))
        return MessageKeys(seal, codec, derived[3 * _KEY_BYTES :], tail)
