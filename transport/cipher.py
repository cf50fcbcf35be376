"""Noise's cipher functions: a key, and a counter that no two messages under it share.

Source: https://noiseprotocol.org/noise.html, sections 5.1 and 12.
"""

from collections.abc import Callable
from struct import Struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from transport.errors import MisuseError
from transport.frozen import frozen
from transport.record_counters import CipherTally

KEY_BYTES = 32
TAG_BYTES = 16
EXHAUSTED = "the message counter of this key is exhausted"
REKEY_NONCE = 2**64 - 1  # reserved by the specification for REKEY()

Buffer = bytes | bytearray | memoryview


@frozen
class Aead:
    """A Noise cipher function: its AEAD and how it lays out the 64-bit nonce."""

    make: Callable[[bytes], ChaCha20Poly1305 | AESGCM]
    nonce: Struct


AEADS = {
    "ChaChaPoly": Aead(ChaCha20Poly1305, Struct("<4xQ")),
    "AESGCM": Aead(AESGCM, Struct(">4xQ")),
}


class CipherState(CipherTally):
    """An AEAD key and its message counter, which moves only when an operation succeeds."""

    __slots__ = ("_aead", "_pack_nonce")

    def __init__(self, aead: Aead, key: bytes) -> None:
        self._aead = aead
        self._pack_nonce = aead.nonce.pack
        self._cipher = aead.make(key)
        self.nonce = 0

    def encrypt(self, ad: Buffer, plaintext: Buffer) -> bytes:
        """Return ciphertext and tag. Raises: MisuseError where the counter is exhausted."""
        sealed = self._cipher.encrypt(self._next_nonce(), plaintext, ad)
        self.nonce += 1
        return sealed

    def decrypt(self, ad: Buffer, sealed: Buffer) -> bytes:
        """Return the plaintext. Raises: InvalidTag; MisuseError where the counter is exhausted."""
        plaintext = self._cipher.decrypt(self._next_nonce(), sealed, ad)
        self.nonce += 1
        return plaintext

    def encrypt_into(self, ad: Buffer, plaintext: Buffer, out: Buffer) -> None:
        """Write what `encrypt` returns to `out`, TAG_BYTES longer. Raises: as `encrypt`."""
        nonce = self.nonce
        if nonce == REKEY_NONCE:
            raise MisuseError(EXHAUSTED)
        self._cipher.encrypt_into(self._pack_nonce(nonce), plaintext, ad, out)
        self.nonce = nonce + 1

    def decrypt_into(self, ad: Buffer, sealed: Buffer, out: Buffer) -> None:
        """Write the plaintext to `out`, len(sealed) - TAG_BYTES long. Raises: as `decrypt`.

        On InvalidTag `out` holds unauthenticated plaintext: the caller must wipe it.
        """
        nonce = self.nonce
        if nonce == REKEY_NONCE:
            raise MisuseError(EXHAUSTED)
        self._cipher.decrypt_into(self._pack_nonce(nonce), sealed, ad, out)
        self.nonce = nonce + 1

    def rekey(self) -> None:
        """Replace the key by REKEY(key), a one-way step; the counter goes on."""
        nonce = self._pack_nonce(REKEY_NONCE)
        key = self._cipher.encrypt(nonce, bytes(KEY_BYTES), b"")[:KEY_BYTES]
        self._cipher = self._aead.make(key)

    def _next_nonce(self) -> bytes:
        if self.nonce == REKEY_NONCE:  # a repeated nonce would give away the key stream
            raise MisuseError(EXHAUSTED)
        return self._pack_nonce(self.nonce)
