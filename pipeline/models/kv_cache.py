"""Keys and values of the tokens each slot has seen, preallocated for the longest context."""

from collections.abc import Sequence

import torch

from pipeline.errors import MessageError
from pipeline.models.batch import Batch, Segment


class KVCache:
    """One request per slot; a layer's keys and values are [slots, kv_heads, max_seq, head_dim].

    The memory is reserved, not touched: the operating system hands out pages as slots fill.
    """

    __slots__ = ("_lengths", "_written", "keys", "max_seq_len", "values")

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_slots, num_kv_heads, max_seq_len, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype) for _ in range(num_layers)]
        self.max_seq_len = max_seq_len
        self._lengths = [0] * num_slots
        self._written = [0] * num_slots  # beyond the length when a step failed half-way

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held per slot."""
        return tuple(self._lengths)

    @property
    def num_slots(self) -> int:
        """How many requests fit side by side."""
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes reserved, whether touched yet or not."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def release(self) -> None:
        """Zero what was used and give the memory back at once, whoever still refers to this."""
        self.clear()
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
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, length : self._written[slot]].zero_()
        self._lengths[slot] = self._written[slot] = length

    def clear(self, slots: Sequence[int] | None = None) -> None:
        """Forget `slots` (all by default): all that was ever written there is zeroed."""
        for slot in range(self.num_slots) if slots is None else slots:
            self.truncate(slot, 0)
