"""The memory of keys and values, and what lies in it of one slot whatever its layout."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.dtypes import FLOAT32, Array, ArrayDType, Floats, HostArray
from pipeline.errors import MessageError

# From a slot's blocks to [kv_heads, blocks, block, head_dim] and back: both are their own inverse.
Order = tuple[int, int, int, int]
KEY_ORDER: Order = (1, 0, 3, 2)
VALUE_ORDER: Order = (1, 0, 2, 3)


class Slide(NamedTuple):
    """Of the `held` rows of a slot `num_dropped` go, behind the first `num_kept`."""

    slot: int
    num_kept: int
    num_dropped: int
    held: int


class Memory(Protocol):
    """Where arrays are: what kernels offer of it."""

    def zeros(self, shape: tuple[int, ...], dtype: ArrayDType) -> Array:
        """Zeros, reserved and not touched where that can be."""

    def give_back(self, array: Array) -> None:
        """Let the memory of contiguous zeros go until they are used again, where that can be."""

    def fill(self, target: Array, rows: HostArray) -> None:
        """Set all of an array, or of a view of one, to a host's."""

    def to_host(self, *arrays: Array) -> tuple[HostArray, ...]:
        """Arrays where the host can read them."""

    def to_device(self, array: HostArray) -> Array:
        """A host's array where these are."""

    def slide(self, keys: Array, values: Array, slide: Slide, cos: Array, sin: Array) -> None:
        """Drop rows of a slot in a layer's cache; the rest moves down, its keys are turned back.

        Shapes: cos, sin [head_dim / 2], of each (j, j + head_dim/2) pair.
        """


class Pages(Protocol):
    """Where arrays of keys and values are had from, and go back to."""

    def zeros(self, shape: tuple[int, ...], dtype: ArrayDType) -> Array:
        """As of `Memory`; where they outlive a process they hold what another has left."""

    def give_back(self, array: Array) -> None:
        """As of `Memory`."""


class LayerKV(NamedTuple):
    """One layer's keys and values of some positions: [kv_heads, positions, head_dim] each."""

    keys: HostArray
    values: HostArray


def turn_of(num_positions: int, frequencies: Floats) -> tuple[Floats, Floats]:
    """(cos, sin) of so many positions, [head_dim / 2]; `frequencies` are radians a position.

    Angles are float64's, and nothing is rounded before the end.
    """
    angles = num_positions * frequencies.astype(np.float64)
    return np.cos(angles).astype(FLOAT32), np.sin(angles).astype(FLOAT32)


def kv_bytes(
    num_slots: int,
    num_kv_heads: int,
    max_seq_len: int,
    head_dim: int,
    key_block: int,
    dtype: ArrayDType,
) -> int:
    """Bytes of one layer's keys and values."""
    capacity = _round_up(max_seq_len, key_block)
    return 2 * num_slots * num_kv_heads * capacity * head_dim * dtype.itemsize


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class KVStorage:
    """A layer's keys and values are [slots, kv_heads, capacity, head_dim].

    With a `key_block` above 1 keys are [slots, capacity / block, kv_heads, head_dim, block] and
    values [slots, capacity / block, kv_heads, block, head_dim], as kernels read them that take a
    block of positions at once: what a slot has seen lies together. The memory is reserved, not
    touched: the operating system hands out zeroed pages as slots fill, and takes them back.
    """

    __slots__ = ("_key_block", "_memory", "_pages", "_row", "capacity", "dtype", "keys", "values")

    def __init__(
        self,
        memory: Memory,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        key_block: int,
        dtype: ArrayDType,
        pages: Pages | None = None,
    ) -> None:
        """`pages`: where it lies instead, of a host."""
        self._pages = pages = pages or memory
        self.capacity = capacity = _round_up(max_seq_len, key_block)
        values: tuple[int, ...] = (num_slots, num_kv_heads, capacity, head_dim)
        keys = values
        if key_block > 1:
            blocks = (num_slots, capacity // key_block, num_kv_heads)
            keys, values = (*blocks, head_dim, key_block), (*blocks, key_block, head_dim)
        self.keys = [pages.zeros(keys, dtype) for _ in range(num_layers)]
        self.values = [pages.zeros(values, dtype) for _ in range(num_layers)]
        self.dtype = dtype
        self._memory = memory
        self._key_block = key_block
        self._row = (num_kv_heads, head_dim)

    @property
    def num_bytes(self) -> int:
        """Bytes reserved, whether touched yet or not."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def range_bytes(self, num_positions: int) -> int:
        """Bytes of the keys and values of so many positions, in all layers together."""
        num_kv_heads, head_dim = self._row
        return 2 * len(self.keys) * num_kv_heads * num_positions * head_dim * self.dtype.itemsize

    def read(self, slot: int, positions: range) -> list[LayerKV]:
        """A copy of what lies at consecutive positions of a slot, of every layer."""
        blocks, inside = self._blocks(positions)

        def part(own: Array, order: Order) -> HostArray:
            return self._by_position(own[slot], blocks, order)[:, inside].copy()

        return [
            LayerKV(part(keys, KEY_ORDER), part(values, VALUE_ORDER))
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def check(self, layers: Sequence[LayerKV]) -> int:
        """How many positions these layers are of. Raises MessageError where they are not as here.

        What has been stored elsewhere may be another model's, or damaged.
        """
        num_kv_heads, head_dim = self._row
        if len(layers) != len(self.keys):
            raise MessageError(f"keys and values of {len(layers)} layers, not {len(self.keys)}")
        num_positions = layers[0].keys.shape[1] if layers and layers[0].keys.ndim > 1 else 0
        expected = (num_kv_heads, num_positions, head_dim)
        for array in (array for layer in layers for array in layer):
            if array.shape != expected or array.dtype != self.dtype:
                raise MessageError(
                    f"keys and values are {array.dtype} {array.shape}, "
                    f"expected {self.dtype} {expected}"
                )
        return num_positions

    def write(self, slot: int, first: int, layers: Sequence[LayerKV]) -> None:
        """Put layers that have been checked at positions first.. of a slot."""
        blocks, inside = self._blocks(range(first, first + layers[0].keys.shape[1]))

        def put(own: Array, rows: HostArray, order: Order) -> None:
            whole = self._by_position(own[slot], blocks, order).copy()
            whole[:, inside] = rows
            self._put(own[slot], blocks, whole, order)

        for keys, values, layer in zip(self.keys, self.values, layers, strict=True):
            put(keys, layer.keys, KEY_ORDER)
            put(values, layer.values, VALUE_ORDER)

    def copy(self, source: int, target: int, length: int) -> None:
        """Put the first `length` positions of one slot at those of another, which is all zero."""
        block = self._key_block
        for each in (*self.keys, *self.values):
            if block == 1:
                each[target, :, :length] = each[source, :, :length]
            else:
                num_blocks = -(-length // block)
                each[target, :num_blocks] = each[source, :num_blocks]
        # The last block may hold more of the source.
        self.zero(target, length, _round_up(length, block))

    def slide(self, slide: Slide, cos: Array, sin: Array) -> None:
        """Drop rows in every layer; the angles are those of the positions that go."""
        for keys, values in zip(self.keys, self.values, strict=True):
            self._memory.slide(keys, values, slide, cos, sin)

    def zero(self, slot: int, first: int, last: int) -> None:
        """Zero positions first..last of a slot; whatever shares the last block is unused.

        Their memory goes back to the system: what a slot has held, another may.
        """
        block = self._key_block
        if first >= last:
            return
        for keys, values in zip(self.keys, self.values, strict=True):
            if block == 1:
                for each in (keys, values):
                    each[slot, :, first:last] = 0
                    for rows in each[slot]:
                        self._pages.give_back(rows[first:last])
            else:
                keys[slot, first // block, :, :, first % block :] = 0
                values[slot, first // block, :, first % block :] = 0
                for each in (keys, values):
                    blocks = each[slot, first // block + 1 : -(-last // block)]
                    blocks[:] = 0
                    # With the one before where that is zero whole.
                    self._pages.give_back(each[slot, -(-first // block) : -(-last // block)])

    def release(self) -> None:
        """Give the memory back, whoever still refers to this."""
        self.keys.clear()
        self.values.clear()

    def _blocks(self, positions: range) -> tuple[slice, slice]:
        """The blocks that positions lie in, and where they lie in these."""
        block = self._key_block
        first = positions.start // block
        inside = slice(positions.start - first * block, positions.stop - first * block)
        return slice(first, max(first, -(-positions.stop // block))), inside

    def _by_position(self, own: Array, blocks: slice, order: Order) -> HostArray:
        """[kv_heads, positions, head_dim] of one slot's blocks, perhaps in its memory."""
        if self._key_block == 1:
            (rows,) = self._memory.to_host(own[:, blocks])
            return rows
        (found,) = self._memory.to_host(own[blocks])
        ordered: HostArray = found.transpose(order)  # [kv_heads, blocks, block, head_dim]
        return ordered.reshape(self._row[0], -1, self._row[1])

    def _put(self, own: Array, blocks: slice, rows: HostArray, order: Order) -> None:
        """The reverse, for whole blocks."""
        if self._key_block == 1:
            self._memory.fill(own[:, blocks], rows)
            return
        num_kv_heads, head_dim = self._row
        ordered = rows.reshape(num_kv_heads, -1, self._key_block, head_dim)
        self._memory.fill(own[blocks], ordered.transpose(order))
