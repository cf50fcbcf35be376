"""Activations as int8 with a scale for each row, after a rotation that spreads outliers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.codecs.base import row_specs
from pipeline.codecs.rotation import Rotation
from pipeline.dtypes import Floats, HostArray
from pipeline.errors import MessageError
from transport.tensor_frames import DType, Tensor, TensorSpec

# Symmetric: -128 is never sent, so that a row and its negative lose the same.
INT8_MAX = 127
# Of a row of zeros.
MIN_SCALE = float(np.finfo(np.float32).tiny)
# Beyond any activation, and small enough that no sum over a row overflows float32.
MAX_SCALE = 2.0**90


def check_scales(scales: Floats) -> None:
    """Refuse rows that are not finite, or absurd. Raises MessageError."""
    # Both comparisons are false for a NaN, which a reduction passes on.
    if not (np.minimum.reduce(scales) >= MIN_SCALE and np.maximum.reduce(scales) <= MAX_SCALE):
        raise MessageError("a row of activations has a scale that is not a positive finite number")


class RotatedInt8:
    """Each row rotated, then quantised symmetrically: I8 [tokens, hidden], F32 scales [tokens].

    Why a scale for the whole row is enough: after the rotation its elements are of a size.
    """

    name: ClassVar[str] = "I8"
    is_plain_f32: ClassVar[bool] = False
    # The greatest quantised magnitude.
    MOST: ClassVar[int] = INT8_MAX

    def __init__(self, hidden_dim: int) -> None:
        """Raises ValueError for a width that has no rotation."""
        self.hidden_dim = hidden_dim
        self._rotation = Rotation(hidden_dim)

    def specs(self, num_tokens: int) -> tuple[TensorSpec, ...]:
        """I8 [tokens, hidden], F32 [tokens]."""
        return _specs(num_tokens, self.hidden_dim)

    def encode(self, hidden: Floats) -> tuple[Tensor, ...]:
        """Rotate and quantise [tokens, hidden]. Raises MessageError unless all are finite."""
        with np.errstate(over="ignore", invalid="ignore"):  # the scale shows both
            rotated = self._rotation.apply(hidden)
        scales = np.maximum.reduce(np.abs(rotated), axis=-1)
        scales /= self.MOST
        np.maximum(scales, MIN_SCALE, out=scales)
        check_scales(scales)
        rotated /= scales[:, None]
        stored = self._pack(np.rint(rotated, out=rotated))
        specs = self.specs(len(hidden))
        return Tensor(specs[0], stored.data.cast("B")), Tensor(specs[1], scales.data.cast("B"))

    def decode(self, tensors: Sequence[Tensor]) -> Floats:
        """Undo both. Raises MessageError for what no encoder writes."""
        quantised, scales = tensors
        factors = np.frombuffer(scales.data, "<f4")
        check_scales(factors)
        rotated = self._unpack(np.frombuffer(quantised.data, np.uint8).reshape(len(factors), -1))
        rotated *= factors[:, None]
        return self._rotation.undo(rotated)

    def _pack(self, quantised: Floats) -> HostArray:
        """Whole numbers of up to MOST, [tokens, hidden], as they travel."""
        return quantised.astype(np.int8)

    def _unpack(self, stored: npt.NDArray[np.uint8]) -> Floats:
        """[tokens, bytes] -> [tokens, hidden]."""
        return stored.view(np.int8).astype(np.float32)


@lru_cache(maxsize=256)
def _specs(num_tokens: int, hidden_dim: int) -> tuple[TensorSpec, ...]:
    scales = TensorSpec(DType.F32, (num_tokens,))
    return (*row_specs(DType.I8, num_tokens, hidden_dim), scales)
