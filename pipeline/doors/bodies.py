"""Bodies as they travel: AES-256-GCM under keys of the session, with all that stands beside them.

Beside a request's body stand session, step, position, shape and dtype; beside an answer's, the
request that it answers. A body of one direction never opens as one of the other.
"""

import hashlib
import os
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.doors.grants import DOMAIN, KEY_BYTES
from pipeline.doors.messages import Payload
from pipeline.errors import MessageError

TAG_BYTES = 16
NONCE_BYTES = 12
# Behind the rows of a body: what a store's state is known by. None of today's is longer.
MAX_MARK_BYTES = 256

# step u64 | position u32 | rows that come back u32
_PLACE = Struct(">QII")
PLACE_BYTES = _PLACE.size
# length of the session's id u16 | of dtype u16 | dimensions u16
_FIELDS = Struct(">HHH")
_DIM = Struct(">q")


class Place(NamedTuple):
    """What a request's `nonce` says: which step, where in the context, how many rows come back."""

    step: int
    position: int
    num_rows: int

    def pack(self) -> bytes:
        """The 16 bytes of the field."""
        return _PLACE.pack(*self)


def parse_place(nonce: Payload) -> Place:
    """Read the field. Raises MessageError unless it has 16 bytes."""
    if len(nonce) != PLACE_BYTES:
        raise MessageError(f"nonce has {len(nonce)} bytes, expected {PLACE_BYTES}")
    return Place(*_PLACE.unpack(nonce))


class Frame(NamedTuple):
    """What stands beside a body, in the clear and authenticated with it."""

    session_id: str
    dtype: str
    shape: Sequence[int]

    def encode(self, direction: bytes, beside: bytes) -> bytes:
        """One text for each frame, direction and what else is `beside` it."""
        session_id, dtype = self.session_id.encode(), self.dtype.encode()
        lengths = _FIELDS.pack(len(session_id), len(dtype), len(self.shape))
        dims = b"".join(map(_DIM.pack, self.shape))
        return b"".join((DOMAIN, direction, lengths, session_id, dtype, dims, beside))


class Bodies:
    """Seals and opens what one session key protects, at either end."""

    def __init__(self, session_key: bytes, core_hash: bytes) -> None:
        """`session_key` is never used twice: see `Place`."""
        info = DOMAIN + b" bodies" + core_hash
        keys = HKDF(SHA256(), 2 * KEY_BYTES, salt=None, info=info).derive(session_key)
        self._requests, self._answers = AESGCM(keys[:KEY_BYTES]), AESGCM(keys[KEY_BYTES:])

    def seal_request(self, frame: Frame, place: Place, plain: Payload) -> bytes:
        """Its nonce is step and position: a client counts its steps, and seals each one once."""
        nonce = place.pack()
        return self._requests.encrypt(nonce[:NONCE_BYTES], plain, frame.encode(b" request", nonce))

    def open_request(self, frame: Frame, place: Place, sealed: Payload) -> bytes:
        """What a client has sealed. Raises MessageError where anything has been changed."""
        nonce = place.pack()
        return _open(self._requests, nonce[:NONCE_BYTES], sealed, frame.encode(b" request", nonce))

    def seal_answer(self, frame: Frame, request: bytes, num_tokens: int, plain: Payload) -> bytes:
        """A nonce and what is sealed under it; `request` is the digest of what it answers.

        Attack: a door whose memory is set back computes a step again, perhaps with other last bits
        than before. Under a nonce that the step decides, both would tell what they differ in.
        """
        nonce = os.urandom(NONCE_BYTES)
        aad = frame.encode(b" answer", request + _DIM.pack(num_tokens))
        return nonce + self._answers.encrypt(nonce, plain, aad)

    def open_answer(
        self, frame: Frame, request: bytes, num_tokens: int, sealed: Payload
    ) -> memoryview:
        """What the door has sealed for that very request. Raises MessageError for anything else."""
        view = memoryview(sealed)
        aad = frame.encode(b" answer", request + _DIM.pack(num_tokens))
        return memoryview(_open(self._answers, bytes(view[:NONCE_BYTES]), view[NONCE_BYTES:], aad))


def request_digest(frame: Frame, place: Place, sealed: Payload) -> bytes:
    """What tells two requests apart: all of one but the grant, which may be sealed anew."""
    digest = hashlib.sha256(frame.encode(b" digest", place.pack()))
    digest.update(sealed)
    return digest.digest()


def _open(key: AESGCM, nonce: bytes, sealed: Payload, aad: bytes) -> bytes:
    try:
        return key.decrypt(nonce, sealed, aad)
    except (InvalidTag, ValueError) as error:  # too short to be anything
        raise MessageError("a body does not open") from error
