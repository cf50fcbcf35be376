"""Small numbers in words of 32 bits, the lowest bits first."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import FLOAT32, Floats, HostArray

WORD_BITS = 32


def unpack_columns(words: HostArray, bits: int, order: Sequence[int] | None = None) -> HostArray:
    """[n, words] -> [n, words * numbers in one]; `order`: where in its word each number is."""
    numbers = _numbers(words[:, :, None], bits, order)
    return numbers.reshape(len(words), -1)


def unpack_rows_of_words(words: HostArray, bits: int) -> HostArray:
    """[words, n] -> [words * numbers in one, n]."""
    numbers = _numbers(words[:, None, :], bits, None, trailing=1)
    return numbers.reshape(-1, words.shape[1])


def _numbers(
    words: HostArray, bits: int, order: Sequence[int] | None, *, trailing: int = 0
) -> npt.NDArray[np.uint8]:
    places = np.array(order if order is not None else range(WORD_BITS // bits), np.uint32)
    shifts = (places * bits).reshape(-1, *[1] * trailing)
    found: npt.NDArray[np.uint8] = (words.view(np.uint32) >> shifts).astype(np.uint8)
    found &= (1 << bits) - 1
    return found


def scaled(numbers: HostArray, zeros: HostArray | int, scales: Floats) -> Floats:
    """(numbers - zeros) * scales in float32."""
    out: Floats = numbers.astype(FLOAT32)
    out -= zeros
    out *= scales
    return out
