"""The key that grants are sealed to: made at boot, renewed hourly, never stored."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pipeline.doors.grants import (
    KEY_ID_BYTES,
    SEALED_BYTES,
    Grant,
    key_id,
    open_grant,
    open_older_grant,
)
from pipeline.doors.messages import DoorError, DoorFault, Payload
from pipeline.errors import InputError, PolicyError
from transport.errors import MisuseError
from transport.private_files import read_private

# What is recorded today opens with the key of that hour alone.
LIFETIME_SECONDS = 3600.0
# For what was sealed a moment before.
GRACE_SECONDS = 300.0
MIN_RSA_BITS = 2048


class WrongKey(Exception):
    """A grant is sealed to a key that this door does not have."""


def load_older_key(path: Path) -> RSAPrivateKey:
    """The RSA key that older clients seal to, PEM. Raises InputError, PolicyError."""
    try:
        key = load_pem_private_key(read_private(path), None)
    except MisuseError as error:
        raise PolicyError(f"key file {error}") from error
    except OSError as error:
        raise InputError(f"cannot read key file {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is not an RSA key in PEM without a password") from error
    if not isinstance(key, RSAPrivateKey) or key.key_size < MIN_RSA_BITS:
        raise InputError(f"{path} holds no RSA key of at least {MIN_RSA_BITS} bits")
    return key


@dataclass(frozen=True, slots=True)
class _Key:
    private: X25519PrivateKey
    public: bytes
    id: bytes
    made: float

    @classmethod
    def make(cls, now: float) -> "_Key":
        private = X25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        return cls(private, public, key_id(public), now)

    def is_valid(self, now: float, seconds: float) -> bool:
        # A clock that has been set back says nothing of a key's age: it counts as too old.
        return self.made <= now < self.made + seconds


class DoorKeys:
    """The key of now and the one before it, by a clock that is looked at whenever one is used."""

    def __init__(self, clock: Callable[[], float], older_key: RSAPrivateKey | None = None) -> None:
        """`clock`: seconds; `older_key` opens what older clients seal."""
        self._clock = clock
        self._older_key = older_key
        self._keys = [_Key.make(clock())]

    def public_key(self) -> bytes:
        """What to seal to now, 32 bytes."""
        return self._valid()[-1].public

    def open(self, sealed: Payload, info: bytes) -> Grant:
        """What is sealed in it. Raises WrongKey, or DoorError for what opens with no key."""
        key = self._key_of(sealed)
        if isinstance(key, RSAPrivateKey):
            return open_older_grant(sealed, key)
        if key is None:
            raise WrongKey
        return open_grant(sealed, key.private, info)

    def has(self, sealed: Payload) -> bool:
        """Whether the key of a grant still counts. Raises DoorError for what is no grant."""
        return self._key_of(sealed) is not None

    def _key_of(self, sealed: Payload) -> "_Key | RSAPrivateKey | None":
        older = self._older_key
        if older is not None and len(sealed) == older.key_size // 8:
            return older
        if len(sealed) not in SEALED_BYTES:
            detail = f"encrypted_session_key has {len(sealed)} bytes, expected {SEALED_BYTES[-1]}"
            raise DoorError(DoorFault.INVALID, detail)
        named = bytes(sealed[:KEY_ID_BYTES])
        return next((key for key in self._valid() if key.id == named), None)

    def _valid(self) -> list[_Key]:
        """The key before, as long as it counts, and the one of now."""
        now = self._clock()
        if not self._keys[-1].is_valid(now, LIFETIME_SECONDS):
            self._keys.append(_Key.make(now))
        newest = self._keys[-1]
        self._keys = [
            key
            for key in self._keys[-2:]
            if key is newest or key.is_valid(now, LIFETIME_SECONDS + GRACE_SECONDS)
        ]
        return self._keys
