"""Keys and values of the tokens each slot has seen, preallocated for the longest context."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.dtypes import Array, ArrayDType
from pipeline.errors import MessageError
from pipeline.protocol.segments import Batch, Segment


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


class KVCache:
    """One request per slot; a layer's keys and values are [slots, kv_heads, capacity, head_dim].

    With a `key_block` above 1 keys are [slots, capacity / block, kv_heads, head_dim, block] and
    values [slots, capacity / block, kv_heads, block, head_dim], as kernels read them that take a
    block of positions at once: what a slot has seen lies together. The memory is reserved, not
    touched: the operating system hands out zeroed pages as slots fill. Behind the requests' slots
    lie `scratch_slots` that no request can name. `recorded`, and `decode_steps` by their number of
    requests, are what kernels keep that refers to this memory and has to end with it.
    """

    __slots__ = (
        "_key_block",
        "_lengths",
        "_written",
        "capacity",
        "decode_steps",
        "keys",
        "max_seq_len",
        "recorded",
        "values",
    )

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        zeros: Callable[[tuple[int, ...], ArrayDType], Array],
        dtype: ArrayDType,
        key_block: int = 1,
        scratch_slots: int = 0,
    ) -> None:
        self.capacity = capacity = _round_up(max_seq_len, key_block)
        slots = num_slots + scratch_slots
        values: tuple[int, ...] = (slots, num_kv_heads, capacity, head_dim)
        keys = values
        if key_block > 1:
            blocks = (slots, capacity // key_block, num_kv_heads)
            keys, values = (*blocks, head_dim, key_block), (*blocks, key_block, head_dim)
        self.keys = [zeros(keys, dtype) for _ in range(num_layers)]
        self.values = [zeros(values, dtype) for _ in range(num_layers)]
        self.recorded: object = None
        self.decode_steps: dict[int, Any] = {}
        self._key_block = key_block
        self.max_seq_len = max_seq_len
        self._lengths = [0] * num_slots
        self._written = [0] * num_slots  # beyond the length when a step failed half-way

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held per slot."""
        return tuple(self._lengths)

    @property
    def held(self) -> list[int]:
        """Tokens held per slot, as they are kept: to be read and not changed."""
        return self._lengths

    @property
    def num_slots(self) -> int:
        """How many requests fit side by side."""
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes reserved, whether touched yet or not."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def release(self) -> None:
        """Zero what was used and give the memory back at once, whoever still refers to this."""
        self.clear()
        self.recorded = None
        self.decode_steps.clear()
        self.keys.clear()
        self.values.clear()

    def reserve(self, batch: Batch) -> None:
        """Admit a step, or refuse one that would not append exactly behind what its slots hold.

        A replayed, lost or reordered step would otherwise silently compute on another history.
        Raises MessageError naming slot, tokens held and position.
        """
        seen: set[int] = set()
        for segment in batch:
            self._check(segment, seen)
        for segment in batch:
            end = segment.position + segment.num_tokens
            self._written[segment.slot] = max(self._written[segment.slot], end)

    def _check(self, segment: Segment, seen: set[int]) -> None:
        slot, position, count = segment.slot, segment.position, segment.num_tokens
        if not 0 <= slot < len(self._lengths):
            raise MessageError(f"slot {slot} does not exist: there are {len(self._lengths)}")
        if slot in seen:
            raise MessageError(f"slot {slot} appears twice in one step")
        seen.add(slot)
        held = self._lengths[slot]
        if position != held:
            raise MessageError(f"slot {slot} holds {held} tokens, but the step is at {position}")
        if count <= 0:
            raise MessageError(f"slot {slot}: a segment of {count} tokens")
        if position + count > self.max_seq_len:
            raise MessageError(
                f"slot {slot} holds {held} tokens; {count} more at position {position} "
                f"exceed the context of {self.max_seq_len}"
            )

    def advance(self, batch: Batch) -> None:
        """Count a computed step's tokens as held."""
        for segment in batch:
            self._lengths[segment.slot] += segment.num_tokens

    def truncate(self, slot: int, length: int) -> None:
        """Roll `slot` back to its first `length` tokens; what was written behind them is zeroed.

        Raises MessageError when the slot does not exist or holds fewer.
        """
        if not 0 <= slot < len(self._lengths):
            raise MessageError(f"slot {slot} does not exist: there are {len(self._lengths)}")
        held = self._lengths[slot]
        if not 0 <= length <= held:
            raise MessageError(f"slot {slot} holds {held} tokens, it cannot keep {length}")
        written = self._written[slot]
        for keys, values in zip(self.keys, self.values, strict=True):
            self._zero(keys[slot], values[slot], length, written)
        self._lengths[slot] = self._written[slot] = length

    def _zero(self, keys: Array, values: Array, first: int, last: int) -> None:
        """Zero positions first..last of one slot; whatever shares the last block is unused."""
        block = self._key_block
        if block == 1:
            keys[:, first:last] = 0
            values[:, first:last] = 0
        elif first < last:
            keys[first // block, :, :, first % block :] = 0
            values[first // block, :, first % block :] = 0
            for each in (keys, values):
                each[first // block + 1 : -(-last // block)] = 0

    def clear(self, slots: Sequence[int] | None = None) -> None:
        """Forget `slots` (all by default): all that was ever written there is zeroed."""
        for slot in range(self.num_slots) if slots is None else slots:
            self.truncate(slot, 0)
