"""An orthogonal rotation that spreads a row's outliers over all of its elements.

A few hidden dimensions of a trained model are hundreds of times larger than the rest, and one int8
scale for the row would leave the rest a handful of values. After the rotation all elements are of a
size. The fixed one is applied and undone by sender and receiver, so weights and hashes stay those
of the checkpoint; a secret one is made of several such (secret_rotation.py).

Source: QuaRot (arXiv:2404.00456) for the idea; the exact matrix is in transport/WIRE.md.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import Floats

SIGNS_DOMAIN = b"veilpipe-activation-rotation/1"
# The odd factor's matrix is dense; models' widths have odd factors below 100.
MAX_ODD_FACTOR = 1024


def odd_factor(size: int) -> int:
    """What is left of `size` when every factor of two is taken out."""
    return size // (size & -size)


def hadamard(size: int) -> npt.NDArray[np.float64]:
    """Sylvester's orthonormal Hadamard matrix; `size` is a power of two."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    orthonormal: npt.NDArray[np.float64] = matrix / math.sqrt(size)
    return orthonormal


def cosines(size: int) -> npt.NDArray[np.float64]:
    """The orthonormal DCT-II: row i, column j is c_i cos(pi (2 j + 1) i / (2 size))."""
    rows, columns = np.mgrid[:size, :size]
    matrix: npt.NDArray[np.float64] = np.cos(
        np.pi * (2 * columns + 1) * rows / (2 * size)
    ) * math.sqrt(2 / size)
    matrix[0] = math.sqrt(1 / size)
    return matrix


def signs(size: int, key: bytes = SIGNS_DOMAIN) -> Floats:
    """Element i is -1 where bit i of SHAKE-256(`key`), lowest bit first, is set, else 1."""
    stream = np.frombuffer(hashlib.shake_256(key).digest(-(-size // 8)), np.uint8)
    bits = np.unpackbits(stream, bitorder="little")[:size]
    return np.where(bits, np.float32(-1), np.float32(1))


def factors(size: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Orthonormal (left, right) whose Kronecker product is cosines ⊗ hadamard; right is symmetric.

    A row seen as [left, right] then takes two small products instead of one large. Raises
    ValueError when `size` has an odd factor above MAX_ODD_FACTOR.
    """
    odd = odd_factor(size)
    if odd > MAX_ODD_FACTOR:
        raise ValueError(f"no rotation for width {size}: its odd factor is {odd}")
    power = size // odd
    right = 1 << (power.bit_length() // 2)
    while right < power and right * right < size:
        right *= 2
    left = np.kron(cosines(odd), hadamard(power // right)).astype(np.float64)
    return left, hadamard(right)


class Rotation:
    """Multiplies rows by (cosines ⊗ hadamard) diag(signs), or undoes it.

    The products are done row by row, in shapes that do not depend on how many rows there are: a
    row's result is the same, bit for bit, in whatever company.
    """

    def __init__(self, size: int) -> None:
        """Raises ValueError for a width that has no `factors`."""
        left, right = factors(size)
        self._shape = (len(left), len(right))
        self._signs = signs(size).reshape(self._shape)
        self._left: Floats = np.ascontiguousarray(left, np.float32)
        self._left_transposed: Floats = np.ascontiguousarray(left.T, np.float32)
        self._right: Floats = right.astype(np.float32)

    def apply(self, rows: Floats) -> Floats:
        """[rows, size] -> [rows, size], rotated."""
        blocks: Floats = rows.reshape(-1, *self._shape) * self._signs
        blocks = self._left @ (blocks @ self._right)
        return blocks.reshape(rows.shape)

    def undo(self, rows: Floats) -> Floats:
        """[rows, size] -> [rows, size], as it was."""
        blocks: Floats = self._left_transposed @ (rows.reshape(-1, *self._shape) @ self._right)
        blocks *= self._signs
        return blocks.reshape(rows.shape)
