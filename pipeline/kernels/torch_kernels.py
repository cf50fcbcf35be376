"""The kernels that run everywhere: torch, and numpy's BLAS for single rows. All in float32.

Weights lie as [in, out], the transpose of a checkpoint's layout, because a single row times such a
matrix streams memory 1.4 times as fast (GPT-2 124M, one thread: 25 ms a token instead of 36), and
numpy's OpenBLAS streams it faster still (22 ms). Decoding one sequence is bound by nothing else.
More rows go through torch.

bfloat16, int8 and int4 weights are rounded as those precisions mean and then held in float32: their
values, but neither their size nor their speed.

A row's result is independent of its batch-mates except in rounding: one row and several rows take
different kernels. The same step always gives the same bits.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from pipeline.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    ArrayDType,
    HostArray,
    to_floats,
)
from pipeline.kernels.base import (
    Activation,
    Attention,
    HeadShape,
    KernelLinear,
    Kernels,
    Linear,
    LinearSpec,
    Norm,
    RMSNorm,
)
from pipeline.kernels.kv_storage import Slide
from pipeline.kernels.runtime import (
    free_mkl_buffers,
    limit_torch,
    overwrite_freed_blocks,
    pin_blas,
)
from pipeline.kernels.torch_attention import TorchAttention, to_cache
from pipeline.protocol.batch import Batch
from pipeline.weights.int4 import Int4, dequantise_int4
from pipeline.weights.quantization import GROUP, dequantise
from pipeline.weights.tensor_sinks import in_precision

CPU = torch.device("cpu")
TORCH_DTYPES: Mapping[ArrayDType, torch.dtype] = {
    FLOAT32: torch.float32,
    FLOAT16: torch.float16,
    BFLOAT16: torch.bfloat16,
    INT8: torch.int8,
}
MatVec = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
_SELF_TEST_SHAPE = (96, 160)
_SELF_TEST_TOLERANCE = 1e-4

ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def to_tensor(array: HostArray) -> torch.Tensor:
    """The same memory as a tensor."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_matvec(row: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """[1, in] @ [in, out] -> out [1, out]."""
    torch.mm(row, weight, out=out)


def blas_matvec(row: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """[1, in] @ [in, out] -> out [1, out] through numpy's BLAS, on the same memory."""
    np.matmul(row.numpy(), weight.numpy(), out=out.numpy())


def choose_matvec() -> MatVec:
    """The single-row product to use here: numpy's BLAS if it can be governed and is right.

    Never chosen by a stopwatch: two processes must not differ in rounding.
    """
    if not pin_blas():
        return torch_matvec
    num_in, num_out = _SELF_TEST_SHAPE
    row = torch.linspace(-1.0, 1.0, num_in).unsqueeze(0)
    weight = torch.linspace(-2.0, 2.0, num_in * num_out).sin().view(num_in, num_out)
    found = torch.empty(1, num_out)
    blas_matvec(row, weight, found)
    error = (found - torch.mm(row, weight)).abs().max().item()
    return blas_matvec if error <= _SELF_TEST_TOLERANCE else torch_matvec


class TorchLinear(KernelLinear):
    """Weights as float32 [in, out]."""

    def __init__(self, kernels: "TorchKernels", spec: LinearSpec, matvec: MatVec) -> None:
        super().__init__(kernels, spec)
        self.weight = torch.empty(spec.num_in, spec.num_out)
        self._activate = None if spec.activation == "none" else ACTIVATIONS[spec.activation]
        self._matvec = matvec

    def __call__(
        self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[rows, in] -> out [rows, out]."""
        y = out if residual is None else torch.empty_like(out)
        if x.shape[0] == 1:
            self._matvec(x, self.weight, y)
            if self.bias is not None:
                y.add_(self.bias)
        elif self.bias is None:
            torch.mm(x, self.weight, out=y)
        else:
            torch.addmm(self.bias, x, self.weight, out=y)
        if self._activate is not None:
            y.copy_(self._activate(y))
        return y if residual is None else torch.add(y, residual, out=out)

    def gather(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Weights of the outputs `ids`, [n, in]."""
        out.copy_(self.weight.index_select(1, ids).t())

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Store outputs first.., [n, in], rounded to this layer's precision, as float32."""
        held = self.weight.numpy()[first_in : first_in + outputs.shape[1]]
        for at, piece, own in in_precision(self.precision, first, outputs, scales):
            weights = to_floats(piece) if own is None else dequantise(piece, own)
            held[:, at : at + len(piece)] = weights.T

    def put_int4(self, first: int, weights: Int4, *, first_in: int = 0) -> None:
        """Store what these outputs mean."""
        held = self.weight.numpy()[first_in : first_in + weights.num_in]
        held[:, first : first + len(weights.levels)] = dequantise_int4(weights).T

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class LayerNorm(Norm):
    """Rows centred, over their deviation, scaled and shifted."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """[rows, size] -> out [rows, size]."""
        return out.copy_(F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps))


class TorchRMSNorm(RMSNorm):
    """Rows over their root mean square, scaled."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """[rows, size] -> out [rows, size]."""
        return out.copy_(self._of(x))

    def add(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """[rows, size], added to out [rows, size]."""
        return out.add_(self._of(x))

    def within(self, rows: torch.Tensor) -> None:
        """In place, of each `size` columns."""
        each = rows.view(rows.shape[0], -1, self.size)
        each.copy_(self._of(each))

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.size,), self.weight, self.eps)


class TorchKernels(Kernels):
    """Everything through torch's public operations."""

    name = "torch"
    key_block = 1
    is_row_exact = False

    def __init__(self, matvec: MatVec | None = None, device: torch.device = CPU) -> None:
        """`matvec` multiplies single rows; by default whatever does it best here."""
        limit_torch()
        overwrite_freed_blocks()
        self.device = device
        self.is_host = device.type == "cpu"
        self._matvec = matvec or choose_matvec()

    def wipe(self) -> None:
        """Free what MKL has copied rows to: freed blocks are overwritten."""
        free_mkl_buffers()

    def empty(self, *shape: int, dtype: ArrayDType = FLOAT32) -> torch.Tensor:
        """A tensor to be filled, on the device."""
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=self.device)

    def zeros(self, shape: tuple[int, ...], dtype: ArrayDType) -> torch.Tensor:
        """Zeros."""
        if not self.is_host:
            return torch.zeros(shape, dtype=TORCH_DTYPES[dtype], device=self.device)
        # torch itself writes the zeros and so touches all of them
        return to_tensor(super().zeros(shape, dtype))

    def give_back(self, array: torch.Tensor) -> None:
        """Let the memory of contiguous zeros go: the host's, a GPU's is allocated as it is."""
        if self.is_host:
            super().give_back(array.numpy())

    def fill(self, target: torch.Tensor, rows: HostArray) -> None:
        """Set all of a tensor, or of rows of one."""
        target.copy_(to_tensor(rows))

    def to_device(self, array: HostArray) -> torch.Tensor:
        """A host's array on the device; on the CPU it shares the memory."""
        return to_tensor(array)

    def to_host(self, *arrays: torch.Tensor) -> tuple[HostArray, ...]:
        """Results where the host can read them, all of them computed."""
        return tuple(tensor.numpy() for tensor in arrays)

    def linear(self, spec: LinearSpec) -> Linear:
        """An empty linear layer."""
        return TorchLinear(self, spec, self._matvec)

    def layer_norm(self, size: int, eps: float) -> Norm:
        """Rows centred, over their deviation, scaled and shifted."""
        return LayerNorm(self, size, eps, bias=True)

    def rms_norm(self, size: int, eps: float) -> RMSNorm:
        """Rows over their root mean square, scaled."""
        return TorchRMSNorm(self, size, eps, bias=False)

    def attention(self, batch: Batch, shape: HeadShape, max_seq_len: int) -> Attention:
        """A step's attention."""
        del max_seq_len
        return TorchAttention(batch, shape)

    def slide(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slide: Slide,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        """Drop rows of a slot; the rest moves down, its keys are turned back."""
        slot, num_kept, num_dropped, held = slide
        down, left = slice(num_kept, held - num_dropped), slice(num_kept + num_dropped, held)
        first, second = keys[slot, :, left].float().chunk(2, dim=-1)
        turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
        keys[slot, :, down] = to_cache(turned, keys)
        values[slot, :, down] = values[slot, :, left].clone()  # the two overlap

    def copy(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """Rows into `out`."""
        out.copy_(source)

    def lookup(
        self,
        table: torch.Tensor,
        ids: torch.Tensor,
        out: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        adds: bool = False,
    ) -> None:
        """Rows of a table."""
        rows = table.index_select(0, ids)
        if scales is not None:
            each = scales.index_select(0, ids).float().repeat_interleave(GROUP, dim=1)
            rows = rows.float() * each[:, : rows.shape[1]]
        if adds:
            out.add_(rows)
        else:
            out.copy_(rows)

    def rope(
        self, qkv: torch.Tensor, shape: HeadShape, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Rotate queries and keys in place."""
        num_rotated, num_dims = shape.num_heads + shape.num_kv_heads, cos.shape[1]
        heads = qkv.view(qkv.shape[0], -1, shape.head_dim)[:, :num_rotated, :num_dims]
        swapped = heads.roll(num_dims // 2, -1)
        heads.mul_(cos.unsqueeze(1)).addcmul_(swapped, sin.unsqueeze(1))

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        inner = out.shape[1]
        return torch.mul(F.silu(gate_up[:, :inner]), gate_up[:, inner:], out=out)

    def gelu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """gelu(gate) * up."""
        inner = out.shape[1]
        gate = F.gelu(gate_up[:, :inner], approximate="tanh")
        return torch.mul(gate, gate_up[:, inner:], out=out)

    def clamped_mul(
        self, gate_up: torch.Tensor, out: torch.Tensor, alpha: float, limit: float
    ) -> torch.Tensor:
        """As `Gate` has it of what is clamped."""
        inner = out.shape[1]
        gate = gate_up[:, :inner].clamp(max=limit)
        up = gate_up[:, inner:].clamp(-limit, limit)
        return torch.mul(gate * torch.sigmoid(alpha * gate), 1 + up, out=out)

    def scale(self, rows: torch.Tensor, factor: float) -> None:
        """Multiply rows in place."""
        rows.mul_(factor)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Index of the first greatest of each row."""
        greatest, found = logits.max(dim=-1)  # NaN where there is one
        return torch.where(greatest.isfinite(), found, -1)
