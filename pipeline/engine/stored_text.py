"""A text whose keys and values outlive its request: what home keeps of it, and where stages do."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from pipeline.protocol.stored_state import Mark, StoredSlot


class SlotStages(Protocol):
    """Stages that can store what a slot holds, all of them alike."""

    async def save(self, slot: int, end: int, stored: StoredSlot) -> Sequence[Sequence[Mark]]:
        """Store a slot's positions up to `end` behind what is stored; each stage's new marks.

        Raises StoreError, or StageLost.
        """
        ...

    async def load(self, slot: int, length: int, stored: StoredSlot) -> None:
        """Put the first `length` stored positions into an empty slot.

        Raises StateRefused or StoreError, when some stages may hold them, or StageLost.
        """
        ...


class StoredText(Protocol):
    """One session, in use by one request."""

    @property
    def session_id(self) -> bytes:
        """What no other session is called by."""
        ...

    def held(self) -> AbstractAsyncContextManager[None]:
        """No other request has it meanwhile, of any process. Raises SessionInUse."""
        ...

    @property
    def stored_ids(self) -> tuple[int, ...]:
        """The tokens whose keys and values stages have stored, all of them as many."""
        ...

    async def load(self, stages: SlotStages, slot: int, length: int) -> None:
        """Put the first of them into an empty slot. Raises as `SlotStages.load`."""
        ...

    async def save(
        self, stages: SlotStages, slot: int, token_ids: tuple[int, ...], num_held: int
    ) -> None:
        """Keep a text, of which the slot holds so many tokens, for good.

        The text is kept even where its keys and values cannot be: then this raises StoreError.
        """
        ...
