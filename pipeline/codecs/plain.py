"""Activations as rows of a number format, copied only to convert them."""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.codecs.base import row_specs
from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Floats, from_floats, to_floats
from pipeline.errors import MessageError
from transport.frozen import frozen
from transport.tensor_frames import DType, Tensor, TensorSpec

_ARRAY_DTYPES = {DType.F32: FLOAT32, DType.F16: FLOAT16, DType.BF16: BFLOAT16}
# The greatest there are: activations of some models are beyond those of F16.
_GREATEST = {DType.F16: 65504.0, DType.BF16: 2.0**128 - 2.0**120}


@frozen
class Plain:
    """One tensor of the wire's dtype: F32, F16 or BF16."""

    dtype: DType
    hidden_dim: int

    @property
    def name(self) -> str:
        """What manifests and messages call it."""
        return self.dtype.name

    @property
    def is_plain_f32(self) -> bool:
        """Whether nothing need be converted."""
        return self.dtype is DType.F32

    def specs(self, num_tokens: int) -> tuple[TensorSpec, ...]:
        """[tokens, hidden] of the dtype."""
        return row_specs(self.dtype, num_tokens, self.hidden_dim)

    def encode(self, hidden: Floats) -> tuple[Tensor, ...]:
        """View [tokens, hidden] as bytes, converted if need be.

        What exceeds F16 or BF16 becomes their greatest, as in the KV cache: as an infinity it would
        make nonsense of all that follows. Raises MessageError for what is not finite; F32 carries
        rows as they were computed.
        """
        most = _GREATEST.get(self.dtype)
        if most is not None and not (greatest := _greatest(hidden)) <= most:
            _check_finite(greatest)
            hidden = hidden.clip(-most, most)
        converted = np.ascontiguousarray(from_floats(hidden, _ARRAY_DTYPES[self.dtype]))
        return (Tensor(self.specs(len(hidden))[0], converted.data.cast("B")),)

    def decode(self, tensors: Sequence[Tensor]) -> Floats:
        """View the bytes as [tokens, hidden], converted if need be.

        Raises MessageError for F16 or BF16 that is not finite: no encoder writes that.
        """
        stored = np.frombuffer(tensors[0].data, _ARRAY_DTYPES[self.dtype])
        rows = to_floats(stored.reshape(tensors[0].spec.shape))
        if self.dtype in _GREATEST:
            _check_finite(_greatest(rows))
        return rows


def _greatest(rows: Floats) -> float:
    """The greatest magnitude; not a number where there is one such."""
    return float(np.maximum.reduce(np.abs(rows), axis=None, initial=0.0))


def _check_finite(greatest: float) -> None:
    if not greatest < math.inf:
        raise MessageError("activations are not finite: a model's numbers overflow")
