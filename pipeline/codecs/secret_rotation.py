"""A secret orthogonal matrix M that a model's residual stream is rotated by.

Rows are h M^T all the way: the weights that read and write them have M in them (see
planning/rotated_weights.py), so that nothing is left to do for a token. M is a product of rounds of
random signs and a fixed mixing, in float64: applying it to a row of width d costs about d^1.5
instead of d^2, and it is orthogonal to about 1e-15.

What it protects is in README.md beside this: nothing, from whoever has the model's weights.
"""

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.codecs.rotation import factors, signs

Doubles = npt.NDArray[np.float64]

MIN_SECRET_BYTES = 32
DOMAIN = b"veilpipe-secret-rotation/1"
# With three, M's elements are like those of a matrix drawn from all rotations.
NUM_ROUNDS = 3


class SecretRotation:
    """Multiplies rows by M, a product of `NUM_ROUNDS` (cosines ⊗ hadamard) diag(signs).

    A row's result is the same, bit for bit, in whatever company.
    """

    def __init__(self, secret: bytes, size: int) -> None:
        """Raises ValueError for a secret that is too short and a width that has no rotation."""
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(
                f"the secret has {len(secret)} bytes; it needs at least {MIN_SECRET_BYTES}"
            )
        self._left, self._right = factors(size)
        shape = (len(self._left), len(self._right))
        self._rounds = [
            signs(size, _derive(secret, b"signs", size, index)).reshape(shape).astype(np.float64)
            for index in range(NUM_ROUNDS)
        ]
        # Public, and says nothing of M: it tells whether two parts have the same one.
        self.fingerprint = _derive(secret, b"fingerprint", size, 0).hex()

    def apply(self, rows: Doubles) -> Doubles:
        """[rows, size] -> [rows, size]: each row h becomes h M^T."""
        blocks = rows.reshape(-1, *self._rounds[0].shape)
        for flips in self._rounds:
            blocks = self._left @ ((blocks * flips) @ self._right)
        return blocks.reshape(rows.shape)

    def undo(self, rows: Doubles) -> Doubles:
        """[rows, size] -> [rows, size], as it was."""
        blocks = rows.reshape(-1, *self._rounds[0].shape)
        for flips in reversed(self._rounds):
            blocks = (self._left.T @ (blocks @ self._right)) * flips
        return blocks.reshape(rows.shape)


def _derive(secret: bytes, purpose: bytes, size: int, index: int) -> bytes:
    info = b"%s %s %d %d" % (DOMAIN, purpose, size, index)
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)
