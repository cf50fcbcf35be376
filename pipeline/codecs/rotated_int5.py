"""Activations in 5 bits an element, rotated first: for links so thin that bytes are the time."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.codecs.rotated_int8 import RotatedInt8, quantised_specs
from pipeline.dtypes import Floats, HostArray
from pipeline.errors import MessageError
from transport.tensor_frames import DType, TensorSpec

BITS = 5


class RotatedInt5(RotatedInt8):
    """As RotatedInt8, but U8 [tokens, bytes] for the whole numbers.

    A row's elements, -15 to 15 and stored with 15 added, follow each other in 5 bits each, lowest
    bit first, as do the bits of each byte; what the last byte has left is zero.
    """

    name: ClassVar[str] = "I5"
    MOST: ClassVar[int] = 15

    def specs(self, num_tokens: int) -> tuple[TensorSpec, ...]:
        """U8 [tokens, ceil(5 hidden / 8)], U8 [tokens, bytes], F32 [tokens]."""
        row_bytes = -(-BITS * self.hidden_dim // 8)
        return quantised_specs(DType.U8, num_tokens, self.hidden_dim, row_bytes)

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
