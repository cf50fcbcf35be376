"""KV slots: which are free, and what the stages still have to do to some of them."""

from collections.abc import Collection
from typing import NamedTuple

from pipeline.protocol.step_header import MAX_SEGMENTS


class Order(NamedTuple):
    """Have a slot hold its first `length` tokens, or those of the slot `source`."""

    slot: int
    length: int
    source: int | None = None
    # Whether nobody owns the slot any more once this is done.
    frees: bool = False
    # Whether what is copied came there in steps, all of it.
    is_replayable: bool = True


class Slots:
    """A slot is free, owned, idle, or ended: nobody's any more and not yet cleared on the stages.

    What stages are to do is done in the order in which it was said here: what is copied is there
    when its turn comes, though its owner may have left meanwhile.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free = list(reversed(range(num_slots)))
        self._orders: list[Order] = []

    @property
    def has_free(self) -> bool:
        """Whether `take` has one to give."""
        return bool(self._free)

    @property
    def is_dirty(self) -> bool:
        """Whether stages have to forget something, or to copy it."""
        return bool(self._orders)

    def take(self) -> int:
        """A free slot, owned from now on."""
        return self._free.pop()

    def end(self, slot: int) -> None:
        """Its request has left: it has to be cleared."""
        self._forget(Order(slot, 0, frees=True))

    def take_back(self, slot: int, length: int) -> None:
        """Only its first `length` tokens are to stay."""
        self._forget(Order(slot, length))

    def copy(self, source: int, target: int, length: int, *, is_replayable: bool = True) -> None:
        """The first `length` tokens of one slot are to be in another as well, which has none."""
        self._orders.append(Order(target, length, source, is_replayable=is_replayable))

    def next_orders(self) -> tuple[Order, ...]:
        """What comes next, said once: all to be forgotten, or all to be copied, each slot once."""
        orders = self._orders
        count, slots = 0, set[int]()
        for order in orders[: MAX_SEGMENTS // 2]:
            is_alike = (order.source is None) is (orders[0].source is None)
            if not is_alike or order.slot in slots:
                break
            slots.add(order.slot)
            count += 1
        self._orders = orders[count:]
        return tuple(orders[:count])

    def free(self, slots: Collection[int]) -> None:
        """The stages have cleared these."""
        self._free += slots

    def rewind(self, owned: Collection[int]) -> None:
        """Every stage goes back to what is certain of these, and to nothing of all others."""
        self._orders = []
        self._free = [slot for slot in reversed(range(self._num_slots)) if slot not in owned]

    def _forget(self, order: Order) -> None:
        """In the place of what was to be forgotten of that slot before, which was less."""
        for index in reversed(range(len(self._orders))):
            before = self._orders[index]
            if before.source is None and before.slot == order.slot:
                del self._orders[index]
                break
            if order.slot in {before.slot, before.source}:
                break
        self._orders.append(order)
