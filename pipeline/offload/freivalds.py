"""Whether an answer is the product that was asked for, found out without computing it.

An answer y to x W is right if y s = x (W s) for secret vectors s, and W s is computed once. Since
2^63 times an even number is nothing in Z_2^64, an answer that is off by 2^63 passes one vector
half the time; any other error passes it less often. All of NUM_VECTORS independent vectors are
passed by no wrong answer more often than once in 2^40.

Whoever answers learns of the vectors only that an answer was right, so that they serve again and
again: after n wrong answers the next one passes with at most n times that probability.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.offload.key_stream import random_words
from pipeline.offload.ring import RingMatrix, Words

NUM_VECTORS = 40


class SecretVectors:
    """Vectors for products of any width, derived from a key that nobody else has."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._of_width: dict[int, RingMatrix] = {}

    def project(self, words: Words) -> Words:
        """Rows [n, width] times the vectors: [n, NUM_VECTORS]."""
        width = words.shape[1]
        if width not in self._of_width:
            vectors = random_words(self._key, width * NUM_VECTORS, width)
            matrix = RingMatrix(width, NUM_VECTORS, is_wide=True)
            matrix.put(0, vectors.view(np.int64).reshape(NUM_VECTORS, width))
            self._of_width[width] = matrix
        return self._of_width[width](words)


class ProductCheck:
    """Tells right answers to x W from wrong ones."""

    def __init__(self, vectors: SecretVectors, projected: Words) -> None:
        """`projected`: what `vectors` make of W^T, [in, NUM_VECTORS]."""
        self._vectors = vectors
        self._matrix = RingMatrix(len(projected), NUM_VECTORS, is_wide=True)
        self._matrix.put(0, projected.view(np.int64).T)

    def is_product(self, x: Words, y: Words) -> bool:
        """Whether y [rows, out] is x [rows, in] times W."""
        return bool((self._vectors.project(y) == self._matrix(x)).all())


def project_weight(vectors: SecretVectors, weight: npt.NDArray[Any]) -> Words:
    """What a check of x W needs of W, [in, out] integers: [in, NUM_VECTORS]."""
    return vectors.project(np.ascontiguousarray(weight, dtype=np.int64).view(np.uint64))
