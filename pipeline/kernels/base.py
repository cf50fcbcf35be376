"""The seam between architectures and arithmetic: what a set of kernels offers.

Activations are float32 [rows, width] whatever the weights' precision. Every operation writes into
`out`, which the caller owns and may reuse; `residual` may be `out` itself. What kernels compute
with, they make (`empty`, `zeros`, `to_device`), C-contiguous: numpy's arrays unless they say else.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from pipeline.dtypes import FLOAT32, Array, ArrayDType, Floats, HostArray, Precision
from pipeline.kernels.gains import AS_STORED, Gain
from pipeline.kernels.host_memory import available_bytes
from pipeline.kernels.huge_pages import give_back, reserve
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.kv_storage import Slide
from pipeline.kernels.routing import ExpertMLPs, Routing
from pipeline.protocol.batch import Batch, positions_of
from pipeline.weights.quantization import quantise
from pipeline.weights.tensor_sinks import CopySink, Fill, Sink, fill_array, linear_sinks
from transport.frozen import frozen

Activation = Literal["none", "gelu_tanh", "gelu", "relu"]


@frozen
class LinearSpec:
    """A linear layer before it is made."""

    num_in: int
    num_out: int
    bias: bool
    precision: Precision
    activation: Activation = "none"


class Linear(Protocol):
    """y = activation(x W^T + b) + residual, wherever that is computed."""

    def __call__(self, x: Array, out: Array, residual: Array | None = None) -> Array:
        """[rows, in] -> out [rows, out]; `residual` may be `out`."""

    def gather(self, ids: Array, out: Array) -> None:
        """Weights of the outputs `ids`, [n, in]: the embedding a head is tied to."""

    def sinks(
        self, name: str, first: int = 0, last: int | None = None, *, is_in_out: bool = False
    ) -> dict[str, Sink]:
        """Sinks of checkpoint layer `name`, which gives outputs first..last of this one."""

    @property
    def num_bytes(self) -> int:
        """Bytes held."""


class KernelLinear(ABC):
    """A linear layer of these kernels, with W held as they like it."""

    def __init__(self, kernels: "Kernels", spec: LinearSpec) -> None:
        self.num_in, self.num_out = spec.num_in, spec.num_out
        self.precision: Precision = spec.precision
        self.bias: Array | None = kernels.weights(spec.num_out) if spec.bias else None
        self._fill: Fill = kernels.fill

    @abstractmethod
    def __call__(self, x: Array, out: Array, residual: Array | None = None) -> Array:
        """[rows, in] -> out [rows, out]."""

    @abstractmethod
    def gather(self, ids: Array, out: Array) -> None:
        """Weights of the outputs `ids`, [n, in]: the embedding a head is tied to."""

    @abstractmethod
    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Store outputs first.., [n, in] as a file holds them, int8 with its scales.

        Or of their inputs those from `first_in` on that are there.
        """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes held."""

    def sinks(
        self, name: str, first: int = 0, last: int | None = None, *, is_in_out: bool = False
    ) -> dict[str, Sink]:
        """Sinks of checkpoint layer `name`, which gives outputs first..last of this one."""
        outputs = range(first, self.num_out if last is None else last)
        return linear_sinks(
            name, self, outputs, self.num_in, self.bias, is_in_out=is_in_out, fill=self._fill
        )


class Norm(ABC):
    """Normalises rows; `bias` is None for RMSNorm."""

    gain: Gain = AS_STORED

    def __init__(self, kernels: "Kernels", size: int, eps: float, *, bias: bool) -> None:
        self.size, self.eps = size, eps
        self.weight: Array = kernels.weights(size)
        self.bias: Array | None = kernels.weights(size) if bias else None
        self._fill: Fill = kernels.fill

    @abstractmethod
    def __call__(self, x: Array, out: Array) -> Array:
        """[rows, size] -> out [rows, size]."""

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        held: int = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
        return held

    def sinks(self, name: str) -> dict[str, Sink]:
        """Sinks of checkpoint norm `name`."""
        fill = self._fill if self.gain == AS_STORED else self._fill_gains
        found: dict[str, Sink] = {f"{name}.weight": CopySink(self.weight, fill=fill)}
        if self.bias is not None:
            found[f"{name}.bias"] = CopySink(self.bias, fill=self._fill)
        return found

    def _fill_gains(self, target: Array, stored: HostArray) -> None:
        self._fill(target, self.gain.of(stored))


class RMSNorm(Norm):
    """Rows over their root mean square, scaled."""

    @abstractmethod
    def add(self, x: Array, out: Array) -> Array:
        """[rows, size], added to out [rows, size]."""

    @abstractmethod
    def within(self, rows: Array) -> None:
        """In place, of each `size` columns of rows [n, a multiple of it], which may be a view."""


class Attention(Protocol):
    """One step's attention: which rows belong to which slot. Made once, called by every layer."""

    def __call__(
        self, qkv: Array, keys: Array, values: Array, out: Array, sinks: Array | None = None
    ) -> Array:
        """Append k and v of each row to the layer's cache, then attend.

        Shapes: qkv [rows, (heads + 2 kv_heads) * head_dim]; returns out [rows, heads * head_dim].
        `sinks`: a score of each head, [heads], that takes its share and gives nothing.
        """


@frozen
class HeadShape:
    """How a row of q, k and v divides, and how far back it may look (`window` 0: to the start)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0

    @property
    def qkv_width(self) -> int:
        """Of a row with queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


# A step's attention in layers whose heads have that shape.
Attend = Callable[[HeadShape], Attention]
# A shard's layers: whose rows, inputs, positions, what attends.
Compute = Callable[[Batch, Array, Array, Attend], Array]
# A model's end: its layers' result to each row's greedy token and its logits.
Finish = Callable[[Array], tuple[Array, Array]]
Rows = bytes | bytearray | memoryview


@frozen
class StepWork:
    """What is computed in a step, over a cache: all that kernels need to run it, or record it."""

    compute: Compute
    cache: KVCache
    # A model's end: makes tokens of rows.
    finish: Finish | None = None
    # Of rows coming in; None for token ids.
    width: int | None = None
    # Whether all of it is the kernels' own, so that it may be recorded.
    is_recordable: bool = True


class FramePlace(NamedTuple):
    """A data frame's memory, and where its step header and its rows start."""

    memory: memoryview
    header: int
    rows: int


# Computes the step of a frame. The nanoseconds that ciphers and sockets have taken go into the
# header of what goes on, with those of computing, which are returned; -1 for a frame that is not
# plainly such a step: then nothing has happened.
Serve = Callable[[memoryview, int, int], int]


class DecodeStep(Protocol):
    """A step in which each of so many requests takes one token, from the wire to the wire."""

    # Of the last step computed, [n, vocab], until any other is; None before a model's end.
    logits: Floats | None

    def __call__(self, batch: Batch, rows: Rows) -> bytearray:
        """Compute the step: U32 [n] or F32 [n, hidden] in, F32 [n, hidden] or U32 [n] out."""

    def server(
        self, form: FramePlace, out: FramePlace, cache: KVCache, *, all_rows: bool = False
    ) -> Serve:
        """What computes the steps of frames like `form`, and lays out those that go on in `out`.

        A step with logits to give takes only what wants none; with `all_rows` one without takes
        only what wants every row as it is.
        """


class Kernels(ABC):
    """Makes layers, and computes what lies between them."""

    name: ClassVar[str]
    # Whether arrays lie in this machine's own memory.
    is_host: bool = True
    # A cache's slots beyond the requests', for rows that only fill a step up.
    scratch_slots: ClassVar[int] = 0
    # Keys are cached as [slots, kv_heads, max_seq / block, head_dim, block]; 1: plain rows.
    key_block: ClassVar[int]
    # Whether a row depends on itself and its own cache alone, bit for bit, in steps of any size.
    is_row_exact: ClassVar[bool]
    # So many rows pass through an MLP at a time: nothing that a step makes is wider.
    block_rows: ClassVar[int] = 1 << 20
    # Whether there is a `decode_step`.
    has_decode_steps: ClassVar[bool] = False

    def run(self, work: StepWork, inputs: HostArray, batch: Batch) -> Array:
        """A step from the host's inputs to the work's result, where these kernels compute."""
        attend = partial(self.attention, batch, max_seq_len=work.cache.capacity)
        positions = self.to_device(positions_of(batch))
        return work.compute(batch, self.to_device(inputs), positions, attend)

    def decode_step(self, work: StepWork, batch: Batch) -> DecodeStep:
        """The steps of batches like this one, for kernels that have them."""
        raise NotImplementedError

    def wipe(self) -> None:  # noqa: B027 - by default there is nothing
        """Zero what steps have left in memory of the kernels' own that outlives their session."""

    def free_bytes(self) -> int:
        """What is free of the memory that these kernels compute in, less a tenth for the rest."""
        free = available_bytes()
        if free is None:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return free * 9 // 10

    def empty(self, *shape: int, dtype: ArrayDType = FLOAT32) -> Array:
        """An array to be filled, where these kernels compute."""
        return np.empty(shape, dtype)

    def weights(self, *shape: int, dtype: ArrayDType = FLOAT32) -> Array:
        """An array to be filled once, with weights."""
        return self.empty(*shape, dtype=dtype)

    def zeros(self, shape: tuple[int, ...], dtype: ArrayDType) -> Array:
        """Zeros, on the CPU in memory that is reserved and not touched."""
        return reserve(shape, dtype)

    def give_back(self, array: Array) -> None:
        """Let the memory of contiguous zeros go until they are used again, where that can be."""
        give_back(array)

    def fill(self, target: Array, rows: HostArray) -> None:
        """Set all of an array, or of rows of one, to a host's of the same shape.

        Floats become such as the array has.
        """
        fill_array(target, rows)

    def quantise(self, outputs: HostArray) -> tuple[HostArray, HostArray]:
        """Values and scales of weights [out, in], any floats: as `weights.quantization`'s."""
        return quantise(outputs)

    def to_device(self, array: HostArray) -> Array:
        """A host's array where these kernels compute; it may share the memory."""
        return array

    def to_host(self, *arrays: Array) -> tuple[HostArray, ...]:
        """Results where the host can read them, all of them computed."""
        return arrays

    @abstractmethod
    def linear(self, spec: LinearSpec) -> Linear:
        """An empty linear layer. Raises InputError for a precision without a product."""

    def experts(
        self, linears: Sequence[tuple[Linear, Linear]], routing: Routing
    ) -> ExpertMLPs | None:
        """MLPs of these linears, gate_up and down of each; None where they are no one operation."""
        del linears, routing
        return None

    @abstractmethod
    def layer_norm(self, size: int, eps: float) -> Norm:
        """Rows centred, over their deviation, scaled and shifted."""

    @abstractmethod
    def rms_norm(self, size: int, eps: float) -> RMSNorm:
        """Rows over their root mean square, scaled."""

    @abstractmethod
    def attention(self, batch: Batch, shape: HeadShape, max_seq_len: int) -> Attention:
        """A step's attention over caches of `max_seq_len` positions."""

    @abstractmethod
    def slide(self, keys: Array, values: Array, slide: Slide, cos: Array, sin: Array) -> None:
        """Drop rows of a slot in a layer's cache; the rest moves down, its keys are turned back.

        Shapes: cos, sin [head_dim / 2], of each (j, j + head_dim/2) pair.
        """

    @abstractmethod
    def copy(self, source: Array, out: Array) -> None:
        """Float32 rows into `out`, of the same shape."""

    @abstractmethod
    def lookup(
        self,
        table: Array,
        ids: Array,
        out: Array,
        *,
        scales: Array | None = None,
        adds: bool = False,
    ) -> None:
        """Rows `ids` of a table into out [n, width], or `adds` them to it.

        Shapes: table [rows, width] in any precision, int8 with scales [rows, groups].
        """

    @abstractmethod
    def rope(self, qkv: Array, shape: HeadShape, cos: Array, sin: Array) -> None:
        """Rotate queries and keys in place: each (j, j + n/2) pair by its row's angle.

        Shapes: cos, sin [rows, n], the first half of sin negated; of a head's dimensions those
        from the n-th on stay as they are.
        """

    @abstractmethod
    def silu_mul(self, gate_up: Array, out: Array) -> Array:
        """silu(gate) * up: [rows, 2 * inner] -> out [rows, inner]."""

    @abstractmethod
    def gelu_mul(self, gate_up: Array, out: Array) -> Array:
        """gelu(gate) * up, by tanh: [rows, 2 * inner] -> out [rows, inner]."""

    @abstractmethod
    def clamped_mul(self, gate_up: Array, out: Array, alpha: float, limit: float) -> Array:
        """As `Gate` has it of what is clamped: [rows, 2 * inner] -> out [rows, inner]."""

    @abstractmethod
    def scale(self, rows: Array, factor: float) -> None:
        """Multiply contiguous rows in place."""

    def turn(self, rows: Array, matrices: Array, num_groups: int = 1, factor: float = 1.0) -> None:
        """Rows [n, heads * groups * width] by `factor` and matrices [heads, width, width]."""
        parted = rows.reshape(len(rows), len(matrices), num_groups, -1) * factor
        rows[...] = (parted @ matrices).reshape(rows.shape)

    def call(self, callable_: Callable[[], None]) -> None:
        """Call what is no kernel, within a step: kernels with a `decode_step` may record it."""
        callable_()

    @abstractmethod
    def argmax(self, logits: Array) -> Array:
        """Index of the first greatest of each row: [rows, n] -> [rows] int64.

        -1 for a row that has a NaN, or whose greatest is infinite.
        """
