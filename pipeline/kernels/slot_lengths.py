"""Which positions of each slot hold tokens: what a step may append to, and how far it may go."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

from pipeline.errors import MessageError
from pipeline.protocol.batch import Batch, Segment
from pipeline.protocol.tide_window import TideWindow


class Counts(Protocol):
    """What slots hold, where that outlives this process."""

    held: "memoryview[int]"
    written: "memoryview[int]"


class SlotLedger:
    """Tokens held per slot, one request each, and how far memory was written behind them.

    Whoever asks speaks of tokens. Under a window fewer rows lie in memory than were held; kernels
    are told where these lie.
    """

    __slots__ = (
        "_counts",
        "_written",
        "held",
        "max_rows",
        "max_seq_len",
        "max_total",
        "reach",
        "rows",
        "window",
    )

    def __init__(
        self,
        num_slots: int,
        max_seq_len: int,
        window: TideWindow | None = None,
        counts: Counts | None = None,
    ) -> None:
        """`counts`: of slots that another process has filled; never under a window."""
        self.max_seq_len = max_seq_len
        self.window = window
        # Rows that all slots together may hold; None: as many as each has room for.
        self.max_total: int | None = None
        # What a slot has memory for.
        self.max_rows = max_seq_len if window is None else window.size
        # A list of one: so many of them may be written to by steps that nobody prepares.
        self.reach = [0]
        # Tokens held per slot, and how many of them lie in memory, which without a window is the
        # same list. To be read and not changed: kernels keep these very lists.
        self.held = [0] * num_slots
        self.rows = self.held if window is None else [0] * num_slots
        # Beyond what is held when a step failed half-way.
        self._written: list[int] | memoryview[int] = [0] * num_slots
        self._counts = counts
        if counts is not None:
            self._go_on_from(counts)

    def _go_on_from(self, counts: Counts) -> None:
        self.held[:] = counts.held
        self._written = counts.written
        for slot, written in enumerate(counts.written):
            self._written[slot] = min(written, self.max_rows)

    def reserve(self, batch: Batch) -> None:
        """Admit a step, or refuse one that would not append exactly behind what its slots hold.

        A replayed, lost or reordered step would otherwise silently compute on another history.
        Raises MessageError naming slot, tokens held and position.
        """
        seen: set[int] = set()
        for segment in batch:
            self._check(segment, seen)
        self._check_total(batch)
        for segment in batch:
            end = min(segment.position + segment.num_tokens, self.max_rows)
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

    def _check_total(self, batch: Batch) -> None:
        """Attack: one who sends more than there is room for would take others' memory."""
        if self.max_total is None:
            return
        if not self.has_room(sum(self._growth(each.slot, each.num_tokens) for each in batch)):
            raise MessageError(
                f"slots hold {sum(self.rows)} of at most {self.max_total} tokens in all, "
                f"and a step brings {sum(each.num_tokens for each in batch)}"
            )

    def has_room(self, num_rows: int) -> bool:
        """Whether all slots together may hold so many more."""
        return self.max_total is None or sum(self.rows) + num_rows <= self.max_total

    def _growth(self, slot: int, num_tokens: int) -> int:
        """How many rows more a slot may come to hold by so many tokens."""
        return min(num_tokens, self.max_rows - self.rows[slot])

    def parts(self, batch: Batch) -> Sequence[Batch]:
        """The step cut where a window drops rows, to be placed and computed one after another."""
        if self.window is None:
            return (batch,)
        cut: list[list[Segment]] = []
        for slot, start, num_tokens in batch:
            pieces, position = [], start
            for count in self.window.pieces(start, num_tokens):
                pieces.append(Segment(slot, position, count))
                position += count
            cut.append(pieces)
        return [tuple(filter(None, part)) for part in zip_longest(*cut)]

    def is_full(self, slot: int) -> bool:
        """Whether rows have to be dropped before a slot takes a token."""
        return self.rows[slot] >= self.max_rows

    def drop(self, slot: int) -> None:
        """Count the rows as gone that a full slot has dropped."""
        assert self.window is not None, "without one a full slot takes nothing more"
        self.rows[slot] -= self.window.num_dropped

    def placed(self, batch: Batch) -> Batch:
        """Where in memory the rows of such a part go."""
        if self.window is None:
            return batch
        rows = self.rows
        return tuple(Segment(slot, rows[slot], num_tokens) for slot, _, num_tokens in batch)

    def advance(self, batch: Batch) -> None:
        """Count a computed step's tokens as held."""
        for slot, _, num_tokens in batch:
            self.held[slot] += num_tokens
        if self._counts is not None:
            for slot, _, _ in batch:
                self._counts.held[slot] = self.held[slot]
        if self.window is not None:
            for slot, _, num_tokens in batch:
                self.rows[slot] += num_tokens

    def truncate(self, slot: int, length: int) -> tuple[int, int]:
        """Roll `slot` back to its first `length` tokens; which rows, from where to where, to zero.

        Raises MessageError when the slot does not exist or holds fewer, or when rows of these have
        been dropped since: `TideWindow.keeps`.
        """
        self.check_slot(slot)
        held, rows = self.held[slot], self.rows[slot]
        if not 0 <= length <= held:
            raise MessageError(f"slot {slot} holds {held} tokens, it cannot keep {length}")
        kept = rows - (held - length) if length else 0
        if length and self.window is not None and rows < held:
            least = self.window.size - self.window.num_dropped
            if kept < least:
                raise MessageError(
                    f"slot {slot} holds {held} tokens and cannot go back to {length}: its window "
                    f"has dropped rows of these since; back to {held - rows + least}, or to none"
                )
        written = self._written[slot]
        self.held[slot] = length
        self.rows[slot] = kept
        if self._counts is not None:
            self._counts.held[slot] = length
        return kept, written

    def zeroed(self, slot: int) -> None:
        """Count what is behind the rows of `slot` as zeroed: who dies before has left some."""
        self._written[slot] = self.rows[slot]

    def check_range(self, slot: int, positions: range) -> None:
        """Raises MessageError unless `slot` holds all of these consecutive positions."""
        self.check_slot(slot)
        held, first, last = self.held[slot], positions.start, positions.stop
        if positions.step != 1 or not 0 <= first <= last <= held:
            raise MessageError(
                f"slot {slot} holds {held} tokens, not the positions {first} to {last}"
            )
        if self.rows[slot] < held:
            raise MessageError(
                f"slot {slot} has dropped rows of its {held} tokens and moved the rest, which has "
                "other positions now: compute it from the tokens again"
            )

    def check_whole(self, slot: int, length: int) -> None:
        """Raises MessageError unless all rows of `length` tokens lie in memory as they came."""
        self.check_slot(slot)
        if self.window is not None and max(length, self.held[slot]) > self.window.size:
            raise MessageError(
                f"slot {slot} would hold {length} tokens, more than its window of "
                f"{self.window.size}: compute what is beyond from the tokens again"
            )

    def check_slot(self, slot: int) -> None:
        """Raises MessageError when there is no such slot."""
        if not 0 <= slot < len(self.held):
            raise MessageError(f"slot {slot} does not exist: there are {len(self.held)}")

    def lengths(self) -> tuple[int, ...]:
        """Tokens held per slot, as they are now."""
        return tuple(self.held)
