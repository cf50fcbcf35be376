"""KV slots: which are free, and which the stages still have to forget something of."""

from collections.abc import Collection

from pipeline.protocol.batch import Segment


class Slots:
    """A slot is free, owned, or ended: left by its request and not yet cleared on the stages."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free = list(reversed(range(num_slots)))
        self._ended: list[int] = []
        # Slots whose stages have to forget what lies at and behind a position.
        self._taken_back: dict[int, int] = {}

    @property
    def has_free(self) -> bool:
        """Whether `take` has one to give."""
        return bool(self._free)

    @property
    def is_dirty(self) -> bool:
        """Whether stages have to forget something."""
        return bool(self._ended or self._taken_back)

    def take(self) -> int:
        """A free slot, owned from now on."""
        return self._free.pop()

    def end(self, slot: int) -> None:
        """Its request has left: it has to be cleared."""
        self._ended.append(slot)

    def take_back(self, slot: int, length: int) -> None:
        """Only its first `length` tokens are to stay."""
        self._taken_back[slot] = length

    def truncate(self) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
        """What the stages have to forget, said once; and the slots that are free when they have."""
        freed, lengths = tuple(self._ended), self._taken_back
        self._ended, self._taken_back = [], {}
        lengths |= dict.fromkeys(freed, 0)
        return tuple(Segment(slot, length, 0) for slot, length in lengths.items()), freed

    def free(self, slots: Collection[int]) -> None:
        """The stages have cleared these."""
        self._free += slots

    def rewind(self, owned: Collection[int]) -> None:
        """Every stage goes back to what is certain of these, and to nothing of all others."""
        self._ended, self._taken_back = [], {}
        self._free = [slot for slot in reversed(range(self._num_slots)) if slot not in owned]
