"""A message as bytes that nobody without the secret can tell from random ones, and back.

    salt 16 | word 4, masked | ciphertext, as long as the message | tag 16

The salt gives every message keys of its own, so each key seals once and no keystream is used twice.
The word is the length of what is sealed, and whether that is compressed. It is authenticated with
the message, and so is the context: what else both ends have to agree on.
"""

import secrets
import zlib
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from pipeline.stego.errors import StegoError, Unreadable
from pipeline.stego.keys import SALT_BYTES, KeySource, MessageKeys

WORD_BYTES = 4
HEADER_BYTES = SALT_BYTES + WORD_BYTES
TAG_BYTES = 16
# A text that carries so many bytes has about a quarter of a million tokens.
MAX_MESSAGE_BYTES = 1 << 16
_IS_COMPRESSED = 1 << 31
_NONCE = bytes(12)  # a key seals once
_RAW_DEFLATE = -15


@dataclass(frozen=True, slots=True)
class SealedMessage:
    """What a text has to carry: the header first, readable before there is a key, then the body."""

    header: bytes
    body: bytes
    keys: MessageKeys = field(repr=False)


def seal(
    message: bytes, secret: KeySource, context: bytes, *, compresses: bool = True
) -> SealedMessage:
    """Seal under a fresh salt; compressed where that is shorter, if at all.

    Raises StegoError for a message that is empty or too long.
    """
    check_message(message)
    salt = secrets.token_bytes(SALT_BYTES)
    keys = secret.keys(salt)
    content, word = message, len(message)
    if compresses and len(packed := zlib.compress(message, 9, _RAW_DEFLATE)) < len(message):
        content, word = packed, len(packed) | _IS_COMPRESSED
    header = salt + _masked(word, keys)
    body = ChaCha20Poly1305(keys.seal).encrypt(_NONCE, content, _bound(word, context))
    return SealedMessage(header, body, keys)


def check_message(message: bytes) -> None:
    """Raise StegoError for a message that is empty or too long."""
    if not message:
        raise StegoError("the message is empty; give at least one byte")
    if len(message) > MAX_MESSAGE_BYTES:
        raise StegoError(
            f"the message has {len(message)} bytes; a text carries at most {MAX_MESSAGE_BYTES}"
        )


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message of which the header is known."""

    keys: MessageKeys = field(repr=False)
    word: int

    @property
    def num_body_bytes(self) -> int:
        """How long the body is."""
        return (self.word & ~_IS_COMPRESSED) + TAG_BYTES

    def open(self, body: bytes, context: bytes) -> bytes:
        """The message. Raises StegoError unless it was sealed so, with this secret and context."""
        bound = _bound(self.word, context)
        try:
            content = ChaCha20Poly1305(self.keys.seal).decrypt(_NONCE, body, bound)
        except InvalidTag:
            raise Unreadable from None
        return _unpacked(content) if self.word & _IS_COMPRESSED else content


def read_header(header: bytes, secret: KeySource) -> Envelope:
    """What the header says to whoever has the secret.

    Raises StegoError for a length that no message has, as almost every wrong secret gives.
    """
    salt, masked = header[:SALT_BYTES], header[SALT_BYTES:]
    keys = secret.keys(salt)
    word = int.from_bytes(masked, "big") ^ int.from_bytes(keys.mask, "big")
    if not 1 <= word & ~_IS_COMPRESSED <= MAX_MESSAGE_BYTES:
        raise Unreadable
    return Envelope(keys, word)


def _masked(word: int, keys: MessageKeys) -> bytes:
    return (word ^ int.from_bytes(keys.mask, "big")).to_bytes(WORD_BYTES, "big")


def _bound(word: int, context: bytes) -> bytes:
    return word.to_bytes(WORD_BYTES, "big") + context


def _unpacked(content: bytes) -> bytes:
    """What was compressed. Attack: a sender who packs gigabytes into the few bytes of a text."""
    inflater = zlib.decompressobj(_RAW_DEFLATE)
    try:
        message = inflater.decompress(content, MAX_MESSAGE_BYTES)
    except zlib.error:
        raise StegoError("the message is authentic, but not compressed as it says") from None
    if not inflater.eof or inflater.unused_data or not message:
        raise StegoError(f"the message is authentic, but not one of 1 to {MAX_MESSAGE_BYTES} bytes")
    return message
