"""Activations in 5 bits an element, rotated first: for links so thin that bytes are the time."""

from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.codecs.rotated_int8 import RotatedInt8
from pipeline.dtypes import Floats, HostArray
from pipeline.errors import MessageError
from transport.tensor_frames import DType, TensorSpec

BITS = 5


class RotatedInt5(RotatedInt8):
    """Each row rotated, then quantised symmetrically: U8 [tokens, bytes], F32 scales [tokens].

    A row's elements, -15 to 15 and stored with 15 added, follow each other in 5 bits each, lowest
    bit first, as do the bits of each byte; what the last byte has left is zero.
    """

    name: ClassVar[str] = "I5"
    MOST: ClassVar[int] = 15

    def specs(self, num_tokens: int) -> tuple[TensorSpec, ...]:
        """U8 [tokens, ceil(5 hidden / 8)], F32 [tokens]."""
        return _specs(num_tokens, self.hidden_dim)

    def _pack(self, quantised: Floats) -> HostArray:
        shifted = (quantised + self.MOST).astype(np.uint8)[:, :, None]
        bits = np.unpackbits(shifted, axis=2, count=BITS, bitorder="little")
        return np.packbits(bits.reshape(len(bits), -1), axis=1, bitorder="little")

    def _unpack(self, stored: npt.NDArray[np.uint8]) -> Floats:
        num_bits = BITS * self.hidden_dim
        bits = np.unpackbits(stored, axis=1, bitorder="little")
        elements = bits[:, :num_bits].reshape(len(bits), -1, BITS)
        shifted = np.packbits(elements, axis=2, bitorder="little")[:, :, 0]
        if bits[:, num_bits:].any() or np.maximum.reduce(shifted, axis=None) > 2 * self.MOST:
            raise MessageError("a row of activations in 5 bits is not one that is written so")
        return shifted.astype(np.float32) - np.float32(self.MOST)


@lru_cache(maxsize=256)
def _specs(num_tokens: int, hidden_dim: int) -> tuple[TensorSpec, ...]:
    row_bytes = -(-BITS * hidden_dim // 8)
    return (
        TensorSpec(DType.U8, (num_tokens, row_bytes)),
        TensorSpec(DType.F32, (num_tokens,)),
    )
