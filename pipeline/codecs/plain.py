"""Activations as rows of a number format, copied only to convert them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.codecs.base import row_specs
from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Floats, from_floats, to_floats
from transport.frames import DType, Tensor, TensorSpec

_ARRAY_DTYPES = {DType.F32: FLOAT32, DType.F16: FLOAT16, DType.BF16: BFLOAT16}


@dataclass(frozen=True, slots=True)
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
        """View [tokens, hidden] as bytes, converted if need be."""
        converted = np.ascontiguousarray(from_floats(hidden, _ARRAY_DTYPES[self.dtype]))
        return (Tensor(self.specs(len(hidden))[0], converted.data.cast("B")),)

    def decode(self, tensors: Sequence[Tensor]) -> Floats:
        """View the bytes as [tokens, hidden], converted if need be."""
        rows = np.frombuffer(tensors[0].data, _ARRAY_DTYPES[self.dtype])
        return to_floats(rows.reshape(tensors[0].spec.shape))
