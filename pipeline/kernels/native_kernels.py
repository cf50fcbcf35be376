"""The kernels written for this processor: `pipeline.kernels._native`, given arrays as they are.

Here a row's result depends on that row and its own cache alone, bit for bit: not on the rows that
come with it, nor on where a prompt is cut into steps, nor on the number of threads.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline.dtypes import (
    FLOAT32,
    ArrayDType,
    Floats,
    HostArray,
    Precision,
    to_floats,
)
from pipeline.kernels import _native
from pipeline.kernels.base import (
    Activation,
    Attention,
    DecodeStep,
    HeadShape,
    KernelLinear,
    Kernels,
    Linear,
    LinearSpec,
    Norm,
    RMSNorm,
    StepWork,
)
from pipeline.kernels.huge_pages import Arena, aligned
from pipeline.kernels.kv_storage import Slide
from pipeline.kernels.native_conversion import STORED, TABLES, fill, quantise, strides
from pipeline.kernels.native_step import NativeAttention, NativeStep, spans_of
from pipeline.kernels.routing import ExpertMLPs, Routing
from pipeline.kernels.runtime import overwrite_freed_blocks, return_large_blocks
from pipeline.kernels.sealed_memory import SealedMemory
from pipeline.protocol.batch import Batch
from pipeline.weights.int4 import Int4, dequantise_int4
from pipeline.weights.quantization import dequantise
from pipeline.weights.tensor_sinks import in_precision

KINDS: Mapping[Precision, int] = {
    "float32": _native.F32,
    "bfloat16": _native.BF16,
    "int8": _native.I8,
    "int4": _native.I4,
}
ACTIVATIONS: Mapping[Activation, int] = {"none": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
GATES = {"silu": 0, "gelu_tanh": 1, "clamped": 2}
KEY_BLOCK = 16


def _kind(precision: Precision) -> int:
    """The kind that holds a precision; float32 with its values where the processor lacks it."""
    return KINDS[precision if precision in _native.features() else "float32"]


class NativeLinear(KernelLinear):
    """Weights packed in the order the kernels stream them."""

    def __init__(self, kernels: "NativeKernels", spec: LinearSpec) -> None:
        super().__init__(kernels, spec)
        self.kind = _kind(spec.precision)
        num_bytes = _native.packed_bytes(self.kind, spec.num_in, spec.num_out)
        self._packed = kernels.arena.take(num_bytes)
        self._activation = ACTIVATIONS[spec.activation]

    def __call__(self, x: Floats, out: Floats, residual: Floats | None = None) -> Floats:
        """[rows, in] -> out [rows, out]."""
        _native.linear(
            self.kind,
            self._packed,
            self.bias,
            x,
            out,
            len(x),
            self.num_in,
            self.num_out,
            self._activation,
            residual,
        )
        return out

    def gather(self, ids: HostArray, out: Floats) -> None:
        """Weights of the outputs `ids`, [n, in]."""
        _native.gather(
            self.kind,
            self._packed,
            self.num_in,
            self.num_out,
            ids,
            len(ids),
            out,
        )

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Pack outputs first.., [n, in] as a file holds them, int8 with its scales."""
        if self.kind == KINDS[self.precision]:
            self._pack(first, first_in, outputs, scales)
            return
        for at, piece, own in in_precision(self.precision, first, outputs, scales):
            weights = to_floats(piece) if own is None else dequantise(piece, own)
            self._pack(at, first_in, weights, None)

    def put_int4(self, first: int, weights: Int4, *, first_in: int = 0) -> None:
        """Pack outputs first.., [n, in], as they are."""
        if self.kind != _native.I4:
            self._pack(first, first_in, dequantise_int4(weights), None)
            return
        levels, scales, zeros = weights
        packed = (self._packed, self.num_in, self.num_out, levels, *strides(levels))
        scales, zeros = np.ascontiguousarray(scales), np.ascontiguousarray(zeros)
        where = (first, len(levels), first_in, weights.num_in)
        _native.pack_int4(*packed, scales, zeros, scales.shape[1], *where)

    def _pack(
        self, first: int, first_in: int, outputs: HostArray, scales: HostArray | None
    ) -> None:
        packed, steps = (self._packed, self.num_in, self.num_out), strides(outputs)
        where = (first, len(outputs), first_in, outputs.shape[1])
        if scales is not None:
            _native.pack_int8(*packed, outputs, *steps, scales, strides(scales)[0], *where)
            return
        _native.pack(self.kind, *packed, STORED[outputs.dtype], outputs, *steps, *where)

    @property
    def address(self) -> int:
        """Of the packed weights."""
        found: int = self._packed.ctypes.data
        return found

    @property
    def bias_address(self) -> int:
        """Of the bias; 0 where there is none."""
        return 0 if self.bias is None else int(self.bias.ctypes.data)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self._packed.nbytes + (0 if self.bias is None else self.bias.nbytes)


class NativeExperts:
    """MLPs of linears that are all packed here, alike."""

    def __init__(
        self, linears: Sequence[tuple[NativeLinear, NativeLinear]], routing: Routing
    ) -> None:
        self._linears = linears  # whose weights the table points to
        self._table = np.array(
            [[*(a.address for a in pair), *(a.bias_address for a in pair)] for pair in linears],
            np.int64,
        )
        self._routing = routing

    def __call__(self, x: Floats, logits: Floats, out: Floats, residual: Floats | None) -> None:
        """What those chosen make of rows, and the residual, into out."""
        routing, (gate_up, down) = self._routing, self._linears[0]
        _native.experts(
            gate_up.kind,
            self._table,
            len(self._linears),
            routing.num_chosen,
            routing.are_normalised,
            GATES[routing.gate.kind],
            routing.gate.alpha,
            routing.gate.limit,
            x,
            logits,
            len(x),
            gate_up.num_in,
            down.num_in,
            out,
            residual,
        )


class LayerNorm(Norm):
    """Rows centred, over their deviation, scaled and shifted."""

    def __call__(self, x: Floats, out: Floats) -> Floats:
        """[rows, size] -> out [rows, size]."""
        _native.layer_norm(
            x,
            self.weight,
            self.bias,
            out,
            len(x),
            self.size,
            self.eps,
        )
        return out


class NativeRMSNorm(RMSNorm):
    """Rows over their root mean square, scaled."""

    def __call__(self, x: Floats, out: Floats) -> Floats:
        """[rows, size] -> out [rows, size]."""
        _native.rms_norm(x, self.weight, out, len(x), self.size, self.eps)
        return out

    def add(self, x: Floats, out: Floats) -> Floats:
        """[rows, size], added to out [rows, size]."""
        _native.add_rms_norm(x, self.weight, out, len(x), self.size, self.eps)
        return out

    def within(self, rows: Floats) -> None:
        """In place, of each `size` columns."""
        count = rows.shape[1] // self.size
        stride = strides(rows)[0]
        _native.rms_norm_within(rows, stride, len(rows), count, self.size, self.weight, self.eps)


class NativeKernels(Kernels):
    """Everything through `pipeline.kernels._native`."""

    name = "native"
    key_block = KEY_BLOCK
    is_row_exact = True
    block_rows = 128
    has_decode_steps = True

    def __init__(self) -> None:
        return_large_blocks()
        overwrite_freed_blocks()
        self.arena = Arena()

    def wipe(self) -> None:
        """Zero what threads have computed in."""
        _native.wipe()

    def empty(self, *shape: int, dtype: ArrayDType = FLOAT32) -> HostArray:
        """An array to be filled."""
        return aligned(np.empty, shape, dtype)

    def weights(self, *shape: int, dtype: ArrayDType = FLOAT32) -> HostArray:
        """An array to be filled once, beside all other weights."""
        return self.arena.array(shape, dtype)

    def hold_weights_in(self, memory: SealedMemory) -> None:
        """Have those of layers made from now on be there."""
        self.arena = Arena(memory.chunk, memory.prepare)

    def fill(self, target: HostArray, rows: HostArray) -> None:
        """Set all of an array, or of rows of one."""
        fill(target, rows)

    def quantise(self, outputs: HostArray) -> tuple[HostArray, HostArray]:
        """Values and scales of weights [out, in]."""
        return quantise(outputs)

    def linear(self, spec: LinearSpec) -> Linear:
        """An empty linear layer."""
        return NativeLinear(self, spec)

    def experts(
        self, linears: Sequence[tuple[Linear, Linear]], routing: Routing
    ) -> ExpertMLPs | None:
        """MLPs of these linears, where all are such as are made here."""
        own = [
            (gate_up, down)
            for gate_up, down in linears
            if isinstance(gate_up, NativeLinear) and isinstance(down, NativeLinear)
        ]
        are_alike = len({each.kind for pair in own for each in pair}) == 1
        return NativeExperts(own, routing) if are_alike and len(own) == len(linears) else None

    def layer_norm(self, size: int, eps: float) -> Norm:
        """Rows centred, over their deviation, scaled and shifted."""
        return LayerNorm(self, size, eps, bias=True)

    def rms_norm(self, size: int, eps: float) -> RMSNorm:
        """Rows over their root mean square, scaled."""
        return NativeRMSNorm(self, size, eps, bias=False)

    def decode_step(self, work: StepWork, batch: Batch) -> DecodeStep:
        """A recorded step."""
        return NativeStep(work, batch)

    def attention(self, batch: Batch, shape: HeadShape, max_seq_len: int) -> Attention:
        """A step's attention."""
        return NativeAttention(spans_of(batch), shape, max_seq_len)

    def slide(self, keys: Floats, values: Floats, slide: Slide, cos: Floats, sin: Floats) -> None:
        """Drop rows of a slot; the rest moves down, its keys are turned back."""
        slot, num_kept, num_dropped, held = slide
        num_blocks, num_kv_heads, head_dim, block = keys.shape[1:]
        _native.slide(
            keys[slot],
            values[slot],
            keys.itemsize,
            num_kv_heads,
            head_dim,
            num_blocks * block,
            num_kept,
            num_dropped,
            held,
            cos,
            sin,
        )

    def copy(self, source: Floats, out: Floats) -> None:
        """Rows into `out`."""
        _native.copy(source, out, out.nbytes)

    def lookup(
        self,
        table: HostArray,
        ids: HostArray,
        out: Floats,
        *,
        scales: HostArray | None = None,
        adds: bool = False,
    ) -> None:
        """Rows of a table."""
        num_rows, width = table.shape
        stride = ids.strides[0] // ids.itemsize
        kind = TABLES[table.dtype]
        _native.lookup(kind, table, scales, num_rows, width, ids, stride, len(ids), adds, out)

    def rope(self, qkv: Floats, shape: HeadShape, cos: Floats, sin: Floats) -> None:
        """Rotate queries and keys in place."""
        _native.rope(
            qkv,
            shape.qkv_width,
            len(qkv),
            shape.num_heads + shape.num_kv_heads,
            shape.head_dim,
            cos.shape[1],
            cos,
            sin,
        )

    def silu_mul(self, gate_up: Floats, out: Floats) -> Floats:
        """silu(gate) * up."""
        _native.silu_mul(gate_up, out, len(out), out.shape[1])
        return out

    def gelu_mul(self, gate_up: Floats, out: Floats) -> Floats:
        """gelu(gate) * up."""
        _native.gelu_mul(gate_up, out, len(out), out.shape[1])
        return out

    def clamped_mul(self, gate_up: Floats, out: Floats, alpha: float, limit: float) -> Floats:
        """As `Gate` has it of what is clamped."""
        _native.clamped_mul(gate_up, out, len(out), out.shape[1], alpha, limit)
        return out

    def scale(self, rows: Floats, factor: float) -> None:
        """Multiply rows in place."""
        _native.scale(rows, rows.size, factor)

    def turn(
        self, rows: Floats, matrices: Floats, num_groups: int = 1, factor: float = 1.0
    ) -> None:
        """Each head's part of rows by that head's matrix, in place."""
        heads, width, _ = matrices.shape
        stride = strides(rows)[0]
        _native.turn_heads(rows, stride, len(rows), heads, num_groups, width, matrices, factor)

    def call(self, callable_: Callable[[], None]) -> None:
        """Call it, or record that it is to be called."""
        _native.call(callable_)

    def argmax(self, logits: Floats) -> HostArray:
        """Index of the first greatest of each row."""
        found = np.empty(len(logits), np.int64)
        _native.argmax(logits, len(logits), logits.shape[1], found)
        return found
