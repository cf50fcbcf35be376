"""Kernels in C for decode steps and prefill: CPUs with AVX-512, AVX2 or NEON; sources in native/.

Optional: installing without a C compiler leaves the module out, and everything runs without it.
An `Address` is an array, or an int, of C-contiguous memory that the caller keeps alive; None or 0:
none. Floats are float32 unless said. Trusted callers only: sizes are checked, memory is not, but an
array that is not C-contiguous is refused, but for arguments that come with strides.

Every function gives a row bit for bit the same result however many rows come with it, wherever a
prompt is cut into chunks, and whatever the number of threads. Raises ValueError for sizes that
cannot be, misaligned packed weights, and kinds this CPU cannot run.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, Self

import numpy.typing as npt

Address = npt.NDArray[Any] | int | None

class Segment(Protocol):
    """What a step needs to know of a batch's segment."""

    @property
    def slot(self) -> int: ...
    @property
    def position(self) -> int: ...

F32: Final = 0
BF16: Final = 1  # weights in bf16, sums in float32; with "bf16_dot" each row is rounded to bf16 too
I8: Final = 2  # weights and activations in int8, a scale for each 32 inputs of an output or a row
I4: Final = 3  # the same with weights in int4, and a zero beside each scale

# Formats of floats in files.
STORED_F32: Final = 0
STORED_BF16: Final = 1
STORED_F16: Final = 3

MAX_THREADS: Final = 256
MAX_CPUS: Final = 1024  # CPUs are numbered below that

def levels() -> tuple[str, ...]:
    """The vector instructions this CPU has that there are kernels for, the fastest first; () none.

    "avx512", "avxvnni" (AVX2, and what multiplies int8), "avx2", "neon". All take the same packed
    weights. All give the same bits, but for BF16 with "bf16_dot".
    """

def use_level(level: str, /) -> None:
    """Compute at that level from now on; no thread may be computing. The first is used if not told.

    Raises ValueError for one that `levels` does not name.
    """

def features() -> tuple[str, ...]:
    """The level in use, then the kinds it computes with; () none.

    Kinds are "float32", "bfloat16", "int8", "int4".

    "bf16_dot": this CPU multiplies bf16 itself, faster than weights can be widened.
    """

def set_num_threads(num_threads: int, /, *cpus: int) -> None:
    """Compute with at most that many threads, up to MAX_THREADS, the caller's included; 1 at first.

    `cpus`: none, or one for each. Threads made from now on stay on theirs; the first is the
    caller's, who has to see to itself.
    """

def wipe() -> None:
    """Zero what the calling thread and the pool's have computed in: scratch and stacks.

    No other thread may be computing. Not recorded.
    """

def call(call: Callable[[], object], /) -> None:
    """Call it. Of what it returns nothing is kept; what it raises ends a program's run."""

class Program:
    """Calls of this module, recorded once and then made by one call.

    Within `with program:` this thread's calls are recorded and not made, of those above `call`'s
    alone. `run` makes them with the same addresses and sizes; what lies at the addresses may have
    changed. The program keeps the arrays it was recorded with; for ints the caller has to.
    """

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def run(self) -> None:
        """Make the calls, in their order, other Python threads running meanwhile.

        Raises as the first call that does, which ends it: ValueError but for what `call` calls.
        """

    def connect(
        self,
        spans: Address,
        num_rows: int,
        inputs: Address,
        num_input_bytes: int,
        outputs: Address,
        num_output_bytes: int,
        /,
    ) -> None:
        """Make it a decode step: its spans, one for each row, as `attend` takes them; its ends."""

    def step(self, batch: Sequence[Segment], rows: bytes | bytearray | memoryview, /) -> bytearray:
        """Run for a segment of one token each: rows in, rows out.

        Raises ValueError as `run`, and for another number of segments or bytes.
        """

    def serve(
        self,
        form: memoryview,
        header: int,
        rows: int,
        out: memoryview,
        out_header: int,
        out_rows: int,
        lengths: list[int],
        num_rows: list[int],
        reach: list[int],
        want: int,
        frame: memoryview,
        crypto_ns: int,
        wire_ns: int,
        /,
    ) -> int:
        """Run for a frame like `form`, into `out`, both with where their headers and rows start.

        The frame's segments must continue slots of those lengths, of one token each, below the one
        number of `reach`; all have to want `want` if that is not 0. The header goes on with the
        time spent here as one timing more. Returns nanoseconds of computing, -1 for any other
        frame, and if a call is refused.
        Raises ValueError for forms of other steps, and what `call` calls.
        """

def packed_bytes(kind: int, num_in: int, num_out: int, /) -> int:
    """Size of a packed weight, which has to be 64-byte aligned and zeroed."""

def pack(
    kind: int,
    dst: Address,
    num_in: int,
    num_out: int,
    stored: int,
    src: Address,
    src_stride_out: int,
    src_stride_in: int,
    first_out: int,
    count: int,
    first_in: int,
    count_in: int,
    /,
) -> None:
    """Write outputs first_out.. and inputs first_in.. of a packed weight.

    src: [count, count_in] floats of a format, converted to the kind's on the way: to bf16 nearest,
    ties to even; to int8 as `quantise`,
    to int4 as `quantise_int4`. Strides in elements. Inputs begin at a multiple of 64, and
    end at one or are the last.
    """

def pack_int8(
    dst: Address,
    num_in: int,
    num_out: int,
    values: Address,
    value_stride_out: int,
    value_stride_in: int,
    scales: Address,
    scale_stride_out: int,
    first_out: int,
    count: int,
    first_in: int,
    count_in: int,
    /,
) -> None:
    """Write outputs of a packed I8 weight that are quantised already, as `pack` would.

    values: int8 [count, count_in]; scales: bf16 [count, count_in / 32 rounded up]. Strides in
    elements.
    """

def pack_int4(
    dst: Address,
    num_in: int,
    num_out: int,
    levels: Address,
    level_stride_out: int,
    level_stride_in: int,
    scales: Address,
    zeros: Address,
    side_stride_out: int,
    first_out: int,
    count: int,
    first_in: int,
    count_in: int,
    /,
) -> None:
    """Write outputs of a packed I4 weight that are quantised already, as `pack` would.

    levels: uint8 [count, count_in], each below 16; scales, zeros: halves [count, count_in / 32
    rounded up], both with the same stride. Strides in elements.
    """

def quantise(
    stored: int,
    src: Address,
    src_stride_out: int,
    src_stride_in: int,
    num_in: int,
    count: int,
    values: Address,
    scales: Address,
    /,
) -> None:
    """Set int8 values [count, in] and bf16 scales [count, in / 32 rounded up] of floats at `src`.

    To the bit what `pipeline.weights.quantization.quantise` finds. Strides in elements.
    """

def quantise_int4(
    stored: int,
    src: Address,
    src_stride_out: int,
    src_stride_in: int,
    num_in: int,
    count: int,
    levels: Address,
    scales: Address,
    zeros: Address,
    /,
) -> None:
    """Set levels, uint8 [count, in], scales and zeros, halves [count, in / 32 rounded up].

    To the bit what `pipeline.weights.int4.quantise_int4` finds. Strides in elements.
    """

def convert(stored: int, src: Address, kind: int, dst: Address, count: int, /) -> None:
    """Floats of one format to F32 or BF16: nearest, ties to even; not numbers to a quiet one."""

def unpack(kind: int, packed: Address, num_in: int, num_out: int, dst: Address, /) -> None:
    """The weight as [out, in] float32, whatever its kind: what `linear` multiplies by."""

def gather(
    kind: int, packed: Address, num_in: int, num_out: int, ids: Address, count: int, dst: Address, /
) -> None:
    """Rows of an embedding packed for the head: dst [count, in] = W[ids], ids int64 [count].

    Raises ValueError for an id that is not below num_out.
    """

def lookup(
    kind: int,
    table: Address,
    scales: Address,
    num_rows: int,
    width: int,
    ids: Address,
    id_stride: int,
    count: int,
    adds: int,
    out: Address,
    /,
) -> None:
    """Set out [count, width] = table[ids], or add that to it; ids int64, id_stride in elements.

    table [num_rows, width]: float32, for BF16 bf16; for I8 int8 with scales bf16
    [num_rows, width / 32 rounded up]. Raises ValueError for an id that is not below num_rows.
    """

def widen(src: Address, dst: Address, count: int, /) -> None:
    """Copy uint32 to int64."""

def narrow(src: Address, dst: Address, count: int, /) -> None:
    """Copy int64 of 0..2^32-1 to uint32."""

def copy(src: Address, dst: Address, num_bytes: int, /) -> None:
    """Copy bytes."""

def linear(
    kind: int,
    packed: Address,
    bias: Address,
    x: Address,
    y: Address,
    rows: int,
    num_in: int,
    num_out: int,
    activation: int,
    residual: Address,
    /,
) -> None:
    """Set y = activation(x W^T + bias) + residual; x [rows, in], y and residual [rows, out].

    activation: 0 none, 1 gelu (tanh), 2 gelu (erf), 3 relu. bias, residual: 0 for none. `residual`
    may be `y` itself; `x` may not overlap `y`.
    """

def experts(
    kind: int,
    table: Address,
    num_experts: int,
    num_chosen: int,
    are_normalised: int,
    gate: int,
    alpha: float,
    limit: float,
    x: Address,
    logits: Address,
    rows: int,
    hidden: int,
    inner: int,
    out: Address,
    residual: Address,
    /,
) -> None:
    """Set out = residual + sum of share * down(gate(x) * up(x)) over the experts of each row.

    Of logits [rows, num_experts] the num_chosen greatest say which, the first of equals; shares are
    their softmax, or that of those chosen alone. gate: 0 silu, 1 gelu (tanh), 2 `clamped_mul`'s, by
    alpha and limit. table: int64 [num_experts, 4], addresses of packed weights gate_up
    [2 * inner, hidden] and down [hidden, inner], and of their biases, 0 for none; x, out, residual
    [rows, hidden]. `residual` may be `out`, `x` may be neither. Raises ValueError where memory is
    short.
    """

def layer_norm(
    x: Address, weight: Address, bias: Address, y: Address, rows: int, size: int, eps: float, /
) -> None:
    """Set y = (x - mean) / sqrt(variance + eps) * weight + bias, [rows, size]; y may be x."""

def rms_norm(x: Address, weight: Address, y: Address, rows: int, size: int, eps: float, /) -> None:
    """Set y = x / sqrt(mean square + eps) * weight, [rows, size]; y may be x."""

def add_rms_norm(
    x: Address, weight: Address, y: Address, rows: int, size: int, eps: float, /
) -> None:
    """Add x / sqrt(mean square + eps) * weight to y, [rows, size]."""

def rms_norm_within(
    x: Address,
    row_stride: int,
    rows: int,
    count: int,
    size: int,
    weight: Address,
    eps: float,
    /,
) -> None:
    """The same as `rms_norm`, in place, of each of the first count * size elements of a row.

    row_stride in elements.
    """

def attend_rows(
    queries: Address,
    keys: Address,
    values: Address,
    head_stride: int,
    num_heads: int,
    num_queries: int,
    num_rows: int,
    width: int,
    outputs: Address,
    log_sums: Address,
    /,
) -> None:
    """Attend to rows that lie one after the other; queries come scaled.

    Shapes: queries and outputs [heads, queries, width]; keys and values [heads, rows, width], of
    which a head's come `head_stride` elements behind another's; log_sums [heads, queries] float64.
    """

def slide(
    keys: Address,
    values: Address,
    itemsize: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq: int,
    num_kept: int,
    num_dropped: int,
    held: int,
    cosines: Address,
    sines: Address,
    /,
) -> None:
    """Of the first `held` rows of a slot drop some behind `num_kept`, and move the rest down.

    keys, values: the slot's part of what `attend` takes. Keys are turned back by the angles
    of cosines, sines: [head_dim / 2].
    """

def rope(
    x: Address,
    row_stride: int,
    rows: int,
    num_heads: int,
    head_dim: int,
    num_dims: int,
    cosines: Address,
    signed_sines: Address,
    /,
) -> None:
    """Rotate, in place, the first num_heads heads of each row of x; row_stride in elements.

    Of a head the first num_dims elements: cosines, signed_sines: [rows, num_dims], the first half
    of the sines negated.
    """

def silu_mul(gate_up: Address, y: Address, rows: int, inner: int, /) -> None:
    """Set y [rows, inner] = silu(gate_up[:, :inner]) * gate_up[:, inner:]."""

def gelu_mul(gate_up: Address, y: Address, rows: int, inner: int, /) -> None:
    """Set y [rows, inner] = gelu(gate_up[:, :inner]) * gate_up[:, inner:], gelu by tanh."""

def clamped_mul(
    gate_up: Address, y: Address, rows: int, inner: int, alpha: float, limit: float, /
) -> None:
    """Set y [rows, inner] = g sigmoid(alpha g) (1 + u), both from gate_up [rows, 2 * inner].

    g = min(gate_up[:, :inner], limit), u = gate_up[:, inner:] within +-limit.
    """

def scale(x: Address, count: int, factor: float, /) -> None:
    """Multiply elements by a factor, in place."""

def turn_heads(
    rows: Address,
    row_stride: int,
    num_rows: int,
    num_heads: int,
    num_groups: int,
    width: int,
    matrices: Address,
    factor: float,
    /,
) -> None:
    """Each head's part of rows, times `factor`, times that head's matrix, in place.

    Shapes: rows [n, heads * groups * width], may come with strides; matrices [heads, width, width].
    """

def take_rows(
    rows: Address,
    num_rows: int,
    order: Address,
    count: int,
    width: int,
    matrix: Address,
    out: Address,
    /,
) -> None:
    """Rows of these numbers (int64), times a matrix [width, width] if that is given."""

def attend(
    qkv: Address,
    row_stride: int,
    out: Address,
    keys: Address,
    values: Address,
    spans: Address,
    num_spans: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq: int,
    window: int,
    itemsize: int,
    sinks: Address,
    /,
) -> None:
    """Append the rows' keys and values to the cache, then attend each span to its own slot.

    Shapes: qkv [rows, (heads + 2 kv_heads) * head_dim], row_stride in elements; out
    [rows, heads * head_dim]; spans int64 [num_spans, 4] of (slot, first row, count, start): the
    span's rows take cache positions start..start + count. window: a row sees so many positions,
    its own included; 0 for all. keys [slots, max_seq / 16, kv_heads, head_dim, 16], values
    [slots, max_seq / 16, kv_heads, 16, head_dim]; max_seq is a multiple of 16. Of a slot only
    positions below start are read. itemsize: 4 for keys and values in float32, 2 for IEEE halves,
    which take what exceeds them as their greatest; sums are float32's. sinks: 0, or a score of each
    head, [num_heads], that takes its share and gives nothing. Raises ValueError for spans that
    leave the context.
    """

def argmax(x: Address, rows: int, n: int, out: Address, /) -> None:
    """Index of the first greatest of each row of x [rows, n] into out, int64 [rows].

    -1 for a row that has a NaN, or whose greatest is infinite.
    """

def ring_product(
    itemsize: int,
    packed: Address,
    x: Address,
    y: Address,
    rows: int,
    num_in: int,
    num_out: int,
    /,
) -> None:
    """Set y [rows, out] = x [rows, in] B in Z_2^64, all in 64 bits but for B.

    packed: B as [out / 8 rounded up, in, 8], itemsize 8, or 4 with a sign. `x` may not overlap `y`.
    """
