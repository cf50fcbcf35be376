"""Keys and values sealed for a store that nobody trusts. Sans-IO: layers in, blobs out, and back.

A session's positions lie in chunks, one behind the other, each a blob a layer. A blob is a header
and what AES-256-GCM or ChaCha20-Poly1305 makes of the keys and then the values, under a key of its
own. What it authenticates beside its header: whose it is, where it belongs, and the link before. A
link is a hash over everything up to some blob, so the last one, kept at home, is the root: it tells
truncated, swapped, reordered, foreign and older state from what was put there last.
"""

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from struct import Struct

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.dtypes import STORED_DTYPES
from pipeline.errors import StateRefused
from pipeline.kernels.kv_storage import LayerKV
from pipeline.protocol.stored_state import KEY_BYTES, Mark

# What lies in a store: a blob for each layer, in order.
Chunk = Sequence[bytes]

VERSION = 1
SALT_BYTES = 32
TAG_BYTES = 16
# Most positions of a chunk: a few hundred kilobytes a layer, so that loading needs little memory.
CHUNK_POSITIONS = 256
_DOMAIN = b"veilpipe sessions/1"
# A key seals one blob: it is made from 32 random bytes, so that no number is ever used twice.
_NONCE = bytes(12)
# version u8 | cipher u8 | dtype u8 | 0 u8 | kv_heads u32 | head_dim u32 | positions u32 |
# position u64 | epoch u64 | salt 32
_HEADER = Struct(f"<BBBxIIIQQ{SALT_BYTES}s")
_DTYPES = dict(enumerate(STORED_DTYPES.values(), start=1))
_DTYPE_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}


class Cipher(IntEnum):
    """What blobs are sealed with."""

    AES_256_GCM = 1
    CHACHA20_POLY1305 = 2


_CIPHERS: dict[int, type[AESGCM] | type[ChaCha20Poly1305]] = {
    Cipher.AES_256_GCM: AESGCM,
    Cipher.CHACHA20_POLY1305: ChaCha20Poly1305,
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where keys and values are from, all of which each blob authenticates.

    `session` and `core_hash` have 32 bytes; `kernels` name what computed, and `window` which
    positions a slot keeps, empty for all of them. A state of another place is refused.
    """

    session: bytes
    core_hash: bytes
    layer_start: int
    layer_end: int
    precision: str
    kernels: str
    window: str = ""

    @property
    def name(self) -> bytes:
        """What a store knows it by, 32 bytes: stages may share one, and it learns no name."""
        return sha256(_DOMAIN + b" name" + self.encode()).digest()

    def encode(self) -> bytes:
        """All of it, each part behind its length: no two places look alike."""
        layers = f"{self.layer_start}-{self.layer_end}"
        texts = (layers, self.precision, self.kernels, self.window)
        parts = (self.session, self.core_hash, *(text.encode() for text in texts))
        return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


class Seal:
    """Seals and opens the chunks of one place under its session's key."""

    def __init__(self, key: bytes, place: Place, cipher: Cipher = Cipher.AES_256_GCM) -> None:
        """`key`: of this session and stage alone. Raises ValueError unless it has 32 bytes."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"a session's key has {KEY_BYTES} bytes, not {len(key)}")
        self._key = key
        self._place = place.encode()
        self._num_layers = place.layer_end - place.layer_start
        self._cipher = cipher
        self.start = Mark(0, sha256(_DOMAIN + b" start" + self._place).digest())

    def seal(self, before: Mark, epoch: int, layers: Sequence[LayerKV]) -> tuple[Chunk, Mark]:
        """What comes behind `before`, [kv_heads, positions, head_dim] each; and where it ends.

        Raises ValueError for another number of layers.
        """
        if len(layers) != self._num_layers:
            raise ValueError(f"{len(layers)} layers, expected {self._num_layers}")
        blobs, link = [], before.root
        for index, layer in enumerate(layers):
            blob = self._seal(link, index, before.position, epoch, layer)
            link = _next_link(link, blob)
            blobs.append(blob)
        return blobs, Mark(before.position + layers[0].keys.shape[1], link)

    def open(self, before: Mark, epoch: int, chunk: Chunk) -> tuple[list[LayerKV], Mark]:
        """The layers of the chunk behind `before`, and where it ends.

        Raises StateRefused unless they were sealed there, with this key and of this place, and no
        later than `epoch`. Whether there ought to be more, or another, the last mark tells.
        """
        if len(chunk) != self._num_layers:
            raise StateRefused(f"{len(chunk)} layers are stored, expected {self._num_layers}")
        layers, link = [], before.root
        for index, blob in enumerate(chunk):
            layers.append(self._open(link, index, before.position, epoch, blob))
            link = _next_link(link, blob)
        return layers, Mark(before.position + layers[0].keys.shape[1], link)

    def _seal(self, link: bytes, index: int, position: int, epoch: int, layer: LayerKV) -> bytes:
        num_heads, num_positions, head_dim = layer.keys.shape
        number, salt = _DTYPE_NUMBERS[layer.keys.dtype], os.urandom(SALT_BYTES)
        sizes = num_heads, head_dim, num_positions
        header = _HEADER.pack(VERSION, self._cipher, number, *sizes, position, epoch, salt)
        plain = np.stack((layer.keys, layer.values)).data.cast("B")
        blob = bytearray(len(header) + len(plain) + TAG_BYTES)
        blob[: len(header)] = header
        cipher = _CIPHERS[self._cipher](self._blob_key(salt))
        into = memoryview(blob)[len(header) :]
        cipher.encrypt_into(_NONCE, plain, self._authenticated(header, index, link), into)
        return bytes(blob)

    def _open(self, link: bytes, index: int, position: int, epoch: int, blob: bytes) -> LayerKV:
        if len(blob) < _HEADER.size + TAG_BYTES:
            raise StateRefused(f"what is stored at position {position} is too short")
        header, sealed = blob[: _HEADER.size], memoryview(blob)[_HEADER.size :]
        version, cipher, number, *sizes, found, sealed_in, salt = _HEADER.unpack(header)
        if version != VERSION or cipher not in _CIPHERS or number not in _DTYPES:
            raise StateRefused(f"what is stored at position {position} is of an unknown kind")
        try:
            key = self._blob_key(salt)
            plain = _CIPHERS[cipher](key).decrypt(
                _NONCE, sealed, self._authenticated(header, index, link)
            )
        except InvalidTag:
            raise StateRefused(
                f"what is stored at position {position} is not what was put there"
            ) from None
        # Authentic from here on, so its own seal has made it; attack: an older one, put back.
        if found != position or sealed_in > epoch:
            raise StateRefused(
                f"what is stored at position {position} is of position {found}, epoch {sealed_in}"
            )
        num_heads, head_dim, num_positions = sizes
        dtype = _DTYPES[number]
        both = np.frombuffer(plain, dtype).reshape(2, num_heads, num_positions, head_dim)
        return LayerKV(both[0], both[1])

    def _blob_key(self, salt: bytes) -> bytes:
        return HKDF(SHA256(), KEY_BYTES, salt, _DOMAIN + b" blob").derive(self._key)

    def _authenticated(self, header: bytes, index: int, link: bytes) -> bytes:
        return header + index.to_bytes(4, "little") + link + self._place


def is_same(one: Mark, other: Mark) -> bool:
    """Whether two marks are of the same state."""
    return one.position == other.position and hmac.compare_digest(one.root, other.root)


def _next_link(link: bytes, blob: bytes) -> bytes:
    return sha256(_DOMAIN + b" link" + link + blob[: _HEADER.size] + blob[-TAG_BYTES:]).digest()
