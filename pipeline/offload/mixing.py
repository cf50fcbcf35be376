"""Rows of a prompt mixed with each other before they leave: A^-1 ((A H) W) = H W.

A is drawn anew for every product. It hides which row is which, and not what the rows have in
common: their span is that of what is sent, and a row of which a copy is known is found in it.
"""

import math
import secrets

import numpy as np

from pipeline.errors import InputError
from pipeline.offload.fixed_point import Doubles
from pipeline.offload.key_stream import KEY_BYTES, random_words

# Of fewer rows A has too little to mix: one row would only be scaled.
MIN_ROWS = 8
# A's condition: what arithmetic loses at most of its digits, and by how much rows differ in weight.
CONDITION = 4.0


class Mixture:
    """One A, for so many rows."""

    def __init__(self, num_rows: int, key: bytes | None = None) -> None:
        """`key`: what A is drawn from, random if not given. Raises InputError for too few rows."""
        if num_rows < MIN_ROWS:
            raise InputError(
                f"{num_rows} rows cannot be mixed, which takes {MIN_ROWS}: they would be told apart"
            )
        uniform = _uniform(
            key or secrets.token_bytes(KEY_BYTES), 2 * num_rows * num_rows + num_rows
        )
        size = num_rows * num_rows
        radius = np.sqrt(-2 * np.log(uniform[:size]))
        normal = radius * np.cos(2 * math.pi * uniform[size : 2 * size])
        # Of all orthogonal matrices, whatever signs a library chooses; then each row its weight,
        # since a rotation alone would leave what rows are to each other.
        q, r = np.linalg.qr(normal.reshape(num_rows, num_rows))
        self._rotation: Doubles = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
        self._weights: Doubles = CONDITION ** (uniform[2 * size :, None] - 0.5)

    def mix(self, rows: Doubles) -> Doubles:
        """A H: [rows, in]."""
        mixed: Doubles = self._rotation @ (self._weights * rows)
        return mixed

    def unmix(self, rows: Doubles) -> Doubles:
        """A^-1 of what has become of them: [rows, out]."""
        found: Doubles = (self._rotation.T @ rows) / self._weights
        return found


def _uniform(key: bytes, count: int) -> Doubles:
    """Strictly between 0 and 1."""
    words = random_words(key, count, 0) >> np.uint64(12)
    uniform: Doubles = ((words + 0.5) * 2.0**-52).astype(np.float64)
    return uniform
