"""A shard's shapes without its memory: which tensors it would load, and how large it would be."""

from typing import Any, NoReturn

import numpy as np

from pipeline.dtypes import FLOAT32, WEIGHT_BYTES, ArrayDType, HostArray
from pipeline.kernels.base import KernelLinear, Kernels, Linear, LinearSpec, Norm, RMSNorm


def _never(self: object, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
    del self, args, kwargs
    raise NotImplementedError("an outline has no memory to compute in")


class OutlineLinear(KernelLinear):
    """The size of a matrix."""

    __call__ = gather = put = _never

    @property
    def num_bytes(self) -> int:
        """Bytes it would hold."""
        weights = self.num_in * self.num_out * WEIGHT_BYTES[self.precision]
        return int(weights) + (0 if self.bias is None else int(self.bias.nbytes))


class OutlineNorm(RMSNorm):
    """The size of a norm."""

    __call__ = add = within = _never


class Outline(Kernels):
    """Makes layers that cannot compute, of any size."""

    name = "none"
    key_block = 1
    is_row_exact = False
    attention = slide = copy = lookup = rope = scale = argmax = fill = _never
    silu_mul = gelu_mul = clamped_mul = _never

    def empty(self, *shape: int, dtype: ArrayDType = FLOAT32) -> HostArray:
        """One number, seen as an array of any size."""
        return np.broadcast_to(np.zeros((), dtype), shape)

    def linear(self, spec: LinearSpec) -> Linear:
        """A linear layer's size."""
        return OutlineLinear(self, spec)

    def layer_norm(self, size: int, eps: float) -> Norm:
        """A norm's size."""
        return OutlineNorm(self, size, eps, bias=True)

    def rms_norm(self, size: int, eps: float) -> RMSNorm:
        """A norm's size."""
        return OutlineNorm(self, size, eps, bias=False)
