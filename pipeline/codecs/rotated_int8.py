"""Activations as int8 after a rotation that spreads outliers; a scale a row, a fraction a group."""

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.codecs.rotation import Rotation
from pipeline.dtypes import Floats, HostArray
from pipeline.errors import MessageError
from transport.tensor_frames import DType, Tensor, TensorSpec

# Symmetric: -128 is never sent, so that a row and its negative lose the same.
INT8_MAX = 127
# So many elements of a rotated row share a step, some sixteenths of the row's. They are like normal
# numbers, the greatest of 4 of them mostly less than half as great as that of a row: errors are
# about half those of one scale a row, for an eighth more bytes.
GROUP = 4
WHOLE = 16
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
    """Each row rotated, then quantised symmetrically in groups.

    I8 [tokens, hidden], U8 [tokens, bytes], F32 scales [tokens]: an element is the whole number
    times its group's fraction (1 to 16 sixteenths, stored less one in 4 bits) times its row's
    scale. Groups are every so manieth element, so that all of a row are multiplied in one go.
    """

    name: ClassVar[str] = "I8"
    is_plain_f32: ClassVar[bool] = False
    # The greatest quantised magnitude.
    MOST: ClassVar[int] = INT8_MAX

    def __init__(self, hidden_dim: int) -> None:
        """Raises ValueError for a width that has no rotation."""
        self.hidden_dim = hidden_dim
        self._rotation = Rotation(hidden_dim)
        self._num_groups = 2 * fraction_bytes(hidden_dim)
        self._padding = GROUP * self._num_groups - hidden_dim

    def specs(self, num_tokens: int) -> tuple[TensorSpec, ...]:
        """I8 [tokens, hidden], U8 [tokens, bytes], F32 [tokens]."""
        return quantised_specs(DType.I8, num_tokens, self.hidden_dim, self.hidden_dim)

    def encode(self, hidden: Floats) -> tuple[Tensor, ...]:
        """Rotate and quantise [tokens, hidden]. Raises MessageError unless all are finite."""
        with np.errstate(over="ignore", invalid="ignore"):  # the scale shows both
            groups = self._in_groups(self._rotation.apply(hidden))
        most = np.maximum.reduce(np.abs(groups), axis=1)
        scales = np.maximum.reduce(most, axis=1)
        scales /= self.MOST
        np.maximum(scales, MIN_SCALE, out=scales)
        check_scales(scales)
        most *= np.float32(WHOLE / self.MOST)
        most /= scales[:, None]
        np.maximum(np.ceil(most, out=most), 1, out=most)
        sixteenths = np.minimum(most, WHOLE, out=most).astype(np.uint8)
        groups /= _steps(sixteenths, scales)
        stored = self._pack(self._in_rows(np.rint(groups, out=groups)))
        sixteenths -= 1
        fractions = sixteenths[:, ::2] | sixteenths[:, 1::2] << 4
        arrays = stored, fractions, scales
        return tuple(
            Tensor(spec, array.data.cast("B"))
            for spec, array in zip(self.specs(len(hidden)), arrays, strict=True)
        )

    def decode(self, tensors: Sequence[Tensor]) -> Floats:
        """Undo both. Raises MessageError for what no encoder writes."""
        quantised, fractions, scales = tensors
        factors = np.frombuffer(scales.data, "<f4")
        check_scales(factors)
        rotated = self._unpack(np.frombuffer(quantised.data, np.uint8).reshape(len(factors), -1))
        packed = np.frombuffer(fractions.data, np.uint8).reshape(len(factors), -1)
        sixteenths = np.empty((len(factors), self._num_groups), np.uint8)
        sixteenths[:, ::2] = packed & 15
        sixteenths[:, 1::2] = packed >> 4
        sixteenths += 1
        groups = self._in_groups(rotated)
        groups *= _steps(sixteenths, factors)
        return self._rotation.undo(self._in_rows(groups))

    def _in_groups(self, rows: Floats) -> Floats:
        """[tokens, hidden] -> [tokens, GROUP, groups], with zeros behind where they do not fit."""
        if self._padding:
            rows = np.pad(rows, ((0, 0), (0, self._padding)))
        return rows.reshape(-1, GROUP, self._num_groups)

    def _in_rows(self, groups: Floats) -> Floats:
        return groups.reshape(len(groups), -1)[:, : self.hidden_dim]

    def _pack(self, quantised: Floats) -> HostArray:
        """Whole numbers of up to MOST, [tokens, hidden], as they travel."""
        return quantised.astype(np.int8, order="C")

    def _unpack(self, stored: npt.NDArray[np.uint8]) -> Floats:
        """[tokens, bytes] -> [tokens, hidden]."""
        return stored.view(np.int8).astype(np.float32)


def fraction_bytes(hidden_dim: int) -> int:
    """Two groups a byte."""
    return -(-hidden_dim // (2 * GROUP))


def _steps(sixteenths: npt.NDArray[np.uint8], scales: Floats) -> Floats:
    """[tokens, groups], [tokens] -> [tokens, 1, groups]: what one is in each group."""
    steps = sixteenths * np.float32(1 / WHOLE)
    steps *= scales[:, None]
    return steps[:, None]


@lru_cache(maxsize=256)
def quantised_specs(
    dtype: DType, num_tokens: int, hidden_dim: int, row_bytes: int
) -> tuple[TensorSpec, ...]:
    """Whole numbers of that many bytes a row, and what to multiply them with."""
    return (
        TensorSpec(dtype, (num_tokens, row_bytes)),
        TensorSpec(DType.U8, (num_tokens, fraction_bytes(hidden_dim))),
        TensorSpec(DType.F32, (num_tokens,)),
    )
