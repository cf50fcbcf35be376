"""The one place where weights meet activations: storage of a linear layer and its product.

Weights lie as [in, out], the transpose of a checkpoint's layout, because a single row times such a
matrix streams memory 1.4 times as fast (GPT-2 124M, one thread: 25 ms a token instead of 36), and
numpy's OpenBLAS streams it faster still (22 ms). Decoding one sequence is bound by nothing else.
More rows go through torch.

A row's result is independent of its batch-mates except in rounding: one row and several rows take
different kernels. The same step always gives the same bits.
"""

from collections.abc import Callable

import numpy as np
import torch

from pipeline.models.runtime import pin_blas

MatVec = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_SELF_TEST_SHAPE = (96, 160)
_SELF_TEST_TOLERANCE = 1e-4


def blas_matvec(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[1, in] @ [in, out] -> [1, out] through numpy's BLAS, on the same memory."""
    return torch.from_numpy(np.matmul(row.numpy(), weight.numpy()))


def choose_matvec() -> MatVec:
    """The single-row product to use here: numpy's BLAS if it can be governed and is right.

    Never chosen by a stopwatch: two processes must not differ in rounding.
    """
    if not pin_blas():
        return torch.mm
    num_in, num_out = _SELF_TEST_SHAPE
    row = torch.linspace(-1.0, 1.0, num_in).unsqueeze(0)
    weight = torch.linspace(-2.0, 2.0, num_in * num_out).sin().view(num_in, num_out)
    error = (blas_matvec(row, weight) - torch.mm(row, weight)).abs().max().item()
    return blas_matvec if error <= _SELF_TEST_TOLERANCE else torch.mm


class Linear:
    """y = x W + b. Shapes: x [rows, in], W [in, out], b [out], y [rows, out]."""

    __slots__ = ("_matvec", "bias", "weight")

    def __init__(
        self, num_in: int, num_out: int, *, bias: bool, dtype: torch.dtype, matvec: MatVec
    ) -> None:
        self.weight = torch.empty(num_in, num_out, dtype=dtype)
        self.bias = torch.empty(num_out, dtype=dtype) if bias else None
        self._matvec = matvec if dtype is torch.float32 else torch.mm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product, freshly allocated: the caller may change it in place."""
        if x.shape[0] == 1:
            y = self._matvec(x, self.weight)
            return y if self.bias is None else y.add_(self.bias)
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def out_in(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Outputs first..last as a checkpoint stores them, [out, in]: a view to load into."""
        return self.weight[:, first:last].t()
