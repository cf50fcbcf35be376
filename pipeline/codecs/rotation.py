"""A fixed orthogonal rotation that spreads a row's outliers over all of its elements.

A few hidden dimensions of a trained model are hundreds of times larger than the rest, and one int8
scale for the row would leave the rest a handful of values. After the rotation all elements are of a
size. Sender and receiver apply and undo it, so weights and hashes stay those of the checkpoint:
folding it into the weights instead would need a shard of its own for every wire, and cannot be done
at all across a LayerNorm, which is not the same after a rotation.

Source: QuaRot (arXiv:2404.00456) for the idea; the exact matrix is in transport/WIRE.md.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

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


def signs(size: int) -> Floats:
    """Element i is -1 where bit i of SHAKE-256(SIGNS_DOMAIN), lowest bit first, is set, else 1."""
    stream = np.frombuffer(hashlib.shake_256(SIGNS_DOMAIN).digest(-(-size // 8)), np.uint8)
    bits = np.unpackbits(stream, bitorder="little")[:size]
    return (1 - 2 * bits.astype(np.float32)).astype(np.float32)


class Rotation:
    """Multiplies rows by (cosines ⊗ hadamard) diag(signs), or undoes it.

    The matrix is a Kronecker product, so a row seen as [left, right] takes two small products
    instead of one large. They are done row by row, in shapes that do not depend on how many rows
    there are: a row's result is the same, bit for bit, in whatever company.
    """

    def __init__(self, size: int) -> None:
        """Raises ValueError when `size` has an odd factor above MAX_ODD_FACTOR."""
        odd = odd_factor(size)
        if odd > MAX_ODD_FACTOR:
            raise ValueError(f"no rotation for width {size}: its odd factor is {odd}")
        power = size // odd
        right = 1 << (power.bit_length() // 2)
        while right < power and right * right < size:
            right *= 2
        left = np.kron(cosines(odd), hadamard(power // right))
        self._shape = (left.shape[0], right)
        self._signs = signs(size).reshape(self._shape)
        self._left: Floats = np.ascontiguousarray(left, np.float32)
        self._left_transposed: Floats = np.ascontiguousarray(left.T, np.float32)
        self._right: Floats = hadamard(right).astype(np.float32)  # its own transpose

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
