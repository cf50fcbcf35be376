"""Rows clipped to a stated length, with Gaussian noise that is always the same for the same row.

What that protects is in README.md beside this, and what it adds up to in privacy_budget.py.
"""

from collections.abc import Iterable
from struct import Struct

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from pipeline.dtypes import Floats

KEY_BYTES = 32
# Request u64 | block u64: AES counts on from there, and a row's blocks are its own.
_COUNTER = Struct(">QQ")


class GaussianNoise:
    """Clips rows to L2 norm `clip` and adds noise of standard deviation `sigma`.

    The noise is a function of key, request and position alone: what is sent once more after a loss
    is what was sent, byte for byte, so that it tells nothing new.
    """

    def __init__(self, sigma: float, clip: float, hidden_dim: int, key: bytes) -> None:
        """`key`: `KEY_BYTES` random bytes, this session's alone.

        Attack: noise that the host can compute is none; rows of another session with the same key
        differ from these by nothing but their tokens.
        """
        self._sigma = sigma
        self._clip = clip
        self._hidden_dim = hidden_dim
        self._num_pairs = -(-hidden_dim // 2)
        self._algorithm = AES256(key)

    def apply(self, rows: Floats, places: Iterable[tuple[int, int, int]]) -> Floats:
        """[rows, hidden] -> the same, clipped and noisy.

        `places`: for each run of rows whose request they are of, the first one's position, and how
        many they are. A place has one row ever: the difference of two would be free of noise.
        """
        wide = rows.astype(np.float64)
        lengths = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
        wide *= np.minimum(1.0, self._clip / np.maximum(lengths, self._clip))
        start = 0
        for request, position, num_rows in places:
            stop = start + num_rows
            wide[start:stop] += self._sigma * self._normal(request, position, num_rows)
            start = stop
        assert start == len(rows), "every row has its place"
        return wide.astype(np.float32)

    def _normal(self, request: int, position: int, num_rows: int) -> npt.NDArray[np.float64]:
        """Standard normal numbers, [num_rows, hidden], by Box and Muller's method."""
        num_blocks = self._num_pairs  # of 16 bytes, two uniform numbers
        counter = _COUNTER.pack(request, position * num_blocks)
        stream = Cipher(self._algorithm, CTR(counter)).encryptor()
        data = stream.update(bytes(16 * num_blocks * num_rows))
        bits = np.frombuffer(data, "<u8").reshape(num_rows, 2, self._num_pairs) >> 11
        uniform = (bits + 1) * 2.0**-53  # above 0, as its logarithm is taken
        radius = np.sqrt(-2 * np.log(uniform[:, 0]))
        angle = 2 * np.pi * uniform[:, 1]
        pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return pairs[:, : self._hidden_dim]
