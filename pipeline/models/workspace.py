"""What passes by between a step's layers, and the memory that it has from step to step."""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.dtypes import FLOAT32, Array
from pipeline.kernels.base import Attention, HeadShape, Kernels
from transport.frozen import frozen


class Block(NamedTuple):
    """Some rows of a step, as many as pass through an MLP at a time, and room for what they are."""

    hidden: Array  # [rows, hidden]
    normed: Array  # [rows, hidden]
    inner: Array  # [rows, intermediate]
    gate_up: Array  # [rows, 2 * intermediate] where the MLP has a gate
    branch: Array  # [rows, hidden]: what an MLP makes of them, where that is normed once more


@frozen
class ForwardPass:
    """What all layers of one forward share: attention, rotary angles, room for what passes by.

    What is not needed at the same time shares memory: `normed` with `mixed`, `qkv` with `gate_up`
    and with `branch`.
    """

    attention: Attention
    rope: tuple[Array, Array] | None
    normed: Array  # [rows, hidden]
    qkv: Array  # [rows, (heads + 2 kv_heads) * head_dim]
    mixed: Array  # [rows, heads * head_dim]
    branch: Array  # [rows, hidden]: what attention makes of rows, where that is normed once more
    blocks: Sequence[Block]  # all rows of `hidden`


class Room:
    """Memory for what layers make of rows; a device's allocator keeps that itself."""

    def __init__(
        self, kernels: Kernels, heads: HeadShape, hidden: int, inner: int, gate_up: int
    ) -> None:
        """Widths of rows: between layers, within an MLP, and before its gate (0 without one)."""
        self._kernels = kernels
        self._hidden, self._inner, self._gate_up = hidden, inner, gate_up
        self._mixed, self._qkv = heads.num_heads * heads.head_dim, max(heads.qkv_width, hidden)
        self._buffers: tuple[Array, ...] = ()
        self._rows = 0

    def num_bytes(self, num_rows: int) -> int:
        """About what a step of that many rows takes, with what kernels make of some of them."""
        mixed, wide = max(self._hidden, self._mixed), max(self._qkv, self._gate_up)
        # rows as they come in, between layers and as they go out
        width = 4 * self._hidden + mixed + 2 * wide + 2 * self._inner
        return num_rows * width * FLOAT32.itemsize

    def forward_pass(
        self, hidden: Array, attention: Attention, rope: tuple[Array, Array] | None
    ) -> ForwardPass:
        """What layers need beside `hidden`, in memory that is kept from step to step."""
        rows, width = hidden.shape
        rowwise, wide, inner = self._memory(rows)
        most = min(rows, self._kernels.block_rows)
        blocks = []
        for part in (hidden[first : first + most] for first in range(0, rows, most)):
            count = len(part)
            blocks.append(
                Block(
                    part,
                    _rows(rowwise, count, width),
                    _rows(inner, count, self._inner),
                    _rows(wide, count, self._gate_up),
                    _rows(wide, count, width),
                )
            )
        return ForwardPass(
            attention,
            rope,
            _rows(rowwise, rows, width),
            _rows(wide, rows, self._qkv),
            _rows(rowwise, rows, self._mixed),
            _rows(wide, rows, width),
            blocks,
        )

    def wipe(self) -> None:
        """Zero what steps have left here."""
        for each in self._buffers:
            each[...] = 0

    def _memory(self, rows: int) -> tuple[Array, ...]:
        kernels = self._kernels
        if kernels.is_host:
            rows = round_up(rows)
            if rows <= self._rows:
                return self._buffers
        blocks = min(rows, kernels.block_rows)
        sizes = (
            rows * max(self._hidden, self._mixed),
            max(rows * self._qkv, blocks * self._gate_up),
            blocks * self._inner,
        )
        memory = tuple(map(kernels.empty, sizes))
        if kernels.is_host:
            self._buffers, self._rows = memory, rows
        return memory


def _rows(memory: Array, rows: int, width: int) -> Array:
    """[rows, width] at the start of flat memory."""
    return memory[: rows * width].reshape(rows, width)


def round_up(rows: int) -> int:
    """The next power of two: recorded steps keep memory that was outgrown, no more than as much."""
    return 1 << (rows - 1).bit_length()
