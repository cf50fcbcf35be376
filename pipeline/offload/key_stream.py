"""Random words of Z_2^64 that whoever has the key derives again: ChaCha20's stream."""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.offload.ring import Words

KEY_BYTES = 32
_NO_BLOCKS = bytes(4)  # the counter that a stream starts with


def derive_key(seed: bytes, purpose: bytes) -> bytes:
    """A key for one purpose alone."""
    return HKDF(SHA256(), KEY_BYTES, None, b"veilpipe offload/1|" + purpose).derive(seed)


def random_words(key: bytes, count: int, first: int, second: int = 0) -> Words:
    """The words of stream (`first`, `second`), which are 8 bytes and 4; no two streams overlap."""
    nonce = _NO_BLOCKS + first.to_bytes(8, "little") + second.to_bytes(4, "little")
    stream = Cipher(ChaCha20(key, nonce), None).encryptor().update(bytes(8 * count))
    return np.frombuffer(stream, "<u8").astype(np.uint64, copy=False)
