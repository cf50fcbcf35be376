"""Which positions of each slot hold tokens: what a step may append to, and how far it may go."""

from pipeline.errors import MessageError
from pipeline.protocol.batch import Batch, Segment


class SlotLedger:
    """Tokens held per slot, one request each, and how far memory was written behind them."""

    __slots__ = ("_written", "held", "max_seq_len")

    def __init__(self, num_slots: int, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        # Tokens held per slot: to be read and not changed. Kernels keep this very list.
        self.held = [0] * num_slots
        self._written = [0] * num_slots  # beyond what is held when a step failed half-way

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
        self.check_slot(slot)
        if slot in seen:
            raise MessageError(f"slot {slot} appears twice in one step")
        seen.add(slot)
        held = self.held[slot]
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
            self.held[segment.slot] += segment.num_tokens

    def truncate(self, slot: int, length: int) -> int:
        """Roll `slot` back to its first `length` tokens; up to where it was written, to be zeroed.

        Raises MessageError when the slot does not exist or holds fewer.
        """
        self.check_slot(slot)
        held = self.held[slot]
        if not 0 <= length <= held:
            raise MessageError(f"slot {slot} holds {held} tokens, it cannot keep {length}")
        written = self._written[slot]
        self.held[slot] = self._written[slot] = length
        return written

    def check_range(self, slot: int, positions: range) -> None:
        """Raises MessageError unless `slot` holds all of these consecutive positions."""
        self.check_slot(slot)
        held, first, last = self.held[slot], positions.start, positions.stop
        if positions.step != 1 or not 0 <= first <= last <= held:
            raise MessageError(
                f"slot {slot} holds {held} tokens, not the positions {first} to {last}"
            )

    def check_slot(self, slot: int) -> None:
        """Raises MessageError when there is no such slot."""
        if not 0 <= slot < len(self.held):
            raise MessageError(f"slot {slot} does not exist: there are {len(self.held)}")

    def lengths(self) -> tuple[int, ...]:
        """Tokens held per slot, as they are now."""
        return tuple(self.held)
