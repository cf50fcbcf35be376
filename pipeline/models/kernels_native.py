"""The kernels written for this processor: `pipeline._native`, given tensors as they are.

Here a row's result depends on that row and its own cache alone, bit for bit: not on the rows that
come with it, nor on where a prompt is cut into steps, nor on the number of threads.
"""

from collections.abc import Mapping

import torch

from pipeline import _native
from pipeline.models.arena import Arena
from pipeline.models.batch import Batch
from pipeline.models.kernels import (
    Activation,
    Attention,
    Compute,
    DecodeStep,
    Finish,
    HeadShape,
    Kernels,
    Linear,
    Norm,
)
from pipeline.models.kv_cache import KVCache
from pipeline.models.native_step import NativeAttention, NativeStep, spans_of
from pipeline.models.quant import dequantise

# Precision -> kind of packed weight, and what the processor must have for it.
KINDS: Mapping[torch.dtype, tuple[int, str]] = {
    torch.float32: (_native.F32, "avx512"),
    torch.bfloat16: (_native.BF16, "bf16"),
    torch.int8: (_native.I8, "vnni"),
}
ACTIVATIONS: Mapping[Activation, int] = {"none": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
KEY_BLOCK = 16


def _kind(precision: torch.dtype) -> int:
    """The kind that holds a precision; float32 with its values where the processor lacks it."""
    kind, feature = KINDS[precision]
    return kind if feature in _native.features() else _native.F32


class NativeLinear(Linear):
    """Weights packed in the order the kernels stream them."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        bias: bool,
        precision: torch.dtype,
        activation: Activation,
        arena: Arena,
    ) -> None:
        super().__init__(num_in, num_out, bias=bias, precision=precision)
        self._kind = _kind(precision)
        self._packed = arena.take(_native.packed_bytes(self._kind, num_in, num_out))
        self._activation = ACTIVATIONS[activation]

    def __call__(
        self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[rows, in] -> out [rows, out]."""
        _native.linear(
            self._kind,
            self._packed,
            self.bias,
            x,
            out,
            x.size(0),
            self.num_in,
            self.num_out,
            self._activation,
            residual,
        )
        return out

    def gather(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Weights of the outputs `ids`, [n, in]."""
        ids = ids.contiguous()
        _native.gather(
            self._kind,
            self._packed,
            self.num_in,
            self.num_out,
            ids,
            len(ids),
            out,
        )

    def put(self, first: int, outputs: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Pack outputs first.., [n, in] in this layer's precision, int8 with its scales."""
        if self._kind == _native.I8:
            assert scales is not None, "int8 comes with scales"
            _native.pack_int8(
                self._packed,
                self.num_in,
                self.num_out,
                outputs,
                outputs.stride(0),
                outputs.stride(1),
                scales,
                scales.stride(0),
                first,
                outputs.shape[0],
            )
            return
        weights = outputs if scales is None else dequantise(outputs, scales)
        if self._kind == _native.F32:
            weights = weights.float()
        _native.pack(
            self._kind,
            self._packed,
            self.num_in,
            self.num_out,
            weights,
            weights.stride(0),
            weights.stride(1),
            first,
            weights.shape[0],
        )

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self._packed.nbytes + (0 if self.bias is None else self.bias.nbytes)


class LayerNorm(Norm):
    """Rows centred, over their deviation, scaled and shifted."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """[rows, size] -> out [rows, size]."""
        _native.layer_norm(
            x,
            self.weight,
            self.bias,
            out,
            x.size(0),
            self.size,
            self.eps,
        )
        return out


class RMSNorm(Norm):
    """Rows over their root mean square, scaled."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """[rows, size] -> out [rows, size]."""
        _native.rms_norm(x, self.weight, out, x.size(0), self.size, self.eps)
        return out


class NativeKernels(Kernels):
    """Everything through `pipeline._native`."""

    name = "native"
    key_block = KEY_BLOCK
    is_row_exact = True
    has_decode_steps = True

    def __init__(self) -> None:
        self._arena = Arena()

    def linear(
        self,
        num_in: int,
        num_out: int,
        *,
        bias: bool,
        precision: torch.dtype,
        activation: Activation = "none",
    ) -> Linear:
        """An empty linear layer."""
        return NativeLinear(
            num_in,
            num_out,
            bias=bias,
            precision=precision,
            activation=activation,
            arena=self._arena,
        )

    def layer_norm(self, size: int, eps: float) -> Norm:
        """Rows centred, over their deviation, scaled and shifted."""
        return LayerNorm(size, eps, bias=True)

    def rms_norm(self, size: int, eps: float) -> Norm:
        """Rows over their root mean square, scaled."""
        return RMSNorm(size, eps, bias=False)

    def decode_step(
        self,
        compute: Compute,
        finish: Finish | None,
        batch: Batch,
        width: int | None,
        shape: HeadShape,
        cache: KVCache,
    ) -> DecodeStep:
        """A recorded step."""
        return NativeStep(compute, finish, batch, width, shape, cache)

    def attention(self, batch: Batch, shape: HeadShape, max_seq_len: int) -> Attention:
        """A step's attention."""
        return NativeAttention(spans_of(batch), shape, max_seq_len)

    def copy(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """Rows into `out`."""
        _native.copy(source.contiguous(), out, out.nbytes)

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
        kind, _ = KINDS[table.dtype]
        num_rows, width = table.shape
        _native.lookup(
            kind, table, scales, num_rows, width, ids, ids.stride(0), len(ids), adds, out
        )

    def rope(
        self, qkv: torch.Tensor, shape: HeadShape, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Rotate queries and keys in place."""
        _native.rope(
            qkv,
            shape.qkv_width,
            qkv.size(0),
            shape.num_heads + shape.num_kv_heads,
            shape.head_dim,
            cos,
            sin,
        )

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        _native.silu_mul(gate_up, out, out.size(0), out.size(1))
        return out

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Index of the first greatest of each row."""
        found = torch.empty(logits.size(0), dtype=torch.int64)
        _native.argmax(logits, logits.size(0), logits.size(1), found)
        return found
