"""Slots that are saved and loaded beside the steps, in a store that is handed in.

The orchestrator orders neither while a step of that slot is under way, and sends none of a slot
that is being loaded until it has heard that it is.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from pipeline.errors import MessageError, StateRefused, StoreError
from pipeline.kernels.kv_storage import LayerKV
from pipeline.protocol.links import ControlLink
from pipeline.protocol.messages import Load, Loaded, NotStored, Save, Saved
from pipeline.protocol.peer_connections import describe
from pipeline.protocol.stored_state import Mark
from pipeline.stage.step_executor import StageCore

logger = logging.getLogger(__name__)

# A store that takes longer is given up: computing a text anew takes seconds as well.
STORE_SECONDS = 10.0
# Between looks whether a step that has been answered is counted: microseconds are left of it.
SETTLE_SECONDS = 0.001

Export = Callable[[range], Sequence[LayerKV]]
Restore = Callable[[int, Sequence[LayerKV]], None]


class SlotStore(Protocol):
    """Where this stage's part of sessions is kept."""

    async def save(self, order: Save, export: Export) -> Sequence[Mark]:
        """Store what is new; the ends of its chunks. Raises StoreError."""
        ...

    async def load(self, order: Load, restore: Restore) -> None:
        """Restore what is stored. Raises StateRefused and StoreError, perhaps half-way."""
        ...


class SlotStorage:
    """Carries out orders to save and to load, and answers them."""

    def __init__(self, core: StageCore, store: SlotStore | None, control: ControlLink) -> None:
        self._core = core
        self._store = store
        self._control = control
        self._scopes: dict[int, trio.CancelScope] = {}

    def take(self, order: Save | Load, tasks: trio.Nursery) -> None:
        """Begin. Raises MessageError for an order that does not fit."""
        slot = order.slot
        if slot >= self._core.limits.num_slots or slot in self._scopes:
            raise MessageError(f"{order.type} of slot {slot} is refused")
        self._scopes[slot] = scope = trio.CancelScope()
        tasks.start_soon(self._run, order, scope)

    def cancel(self) -> None:
        """Give up what is under way: slots go back to what they held."""
        for scope in self._scopes.values():
            scope.cancel()
        self._scopes.clear()

    async def _run(self, order: Save | Load, scope: trio.CancelScope) -> None:
        with scope:
            answer = await self._answer(order)
            if self._scopes.get(order.slot) is scope:
                del self._scopes[order.slot]
                if isinstance(order, Load) and isinstance(answer, NotStored):
                    self._core.cache.truncate(order.slot, 0)
                await self._control.send(answer)

    async def _answer(self, order: Save | Load) -> Saved | Loaded | NotStored:
        is_void, detail = False, f"it took longer than {STORE_SECONDS:g} s"
        try:
            with trio.fail_after(STORE_SECONDS):
                if isinstance(order, Load):
                    await self._load(order)
                    return Loaded(operation=order.operation)
                marks = await self._save(order)
                positions, roots = [mark.position for mark in marks], [mark.root for mark in marks]
                return Saved(operation=order.operation, positions=positions, roots=roots)
        except trio.TooSlowError:
            pass
        except (StateRefused, StoreError) as error:
            is_void, detail = isinstance(error, StateRefused), describe(error)
        logger.warning("event=%s_failed slot=%d error=%s", order.type, order.slot, detail)
        return NotStored(operation=order.operation, is_void=is_void, detail=detail)

    async def _load(self, order: Load) -> None:
        store, cache = self._stored(), self._core.cache
        # Steps are on their way that clear it, and what it takes the place of.
        while cache.lengths[order.slot] or not cache.ledger.has_room(order.length):  # noqa: ASYNC110
            await trio.sleep(SETTLE_SECONDS)

        def restore(position: int, layers: Sequence[LayerKV]) -> None:
            try:
                cache.restore(order.slot, position, layers)
            except MessageError as error:
                raise StateRefused(f"what is stored does not fit: {error}") from error

        await store.load(order, restore)

    async def _save(self, order: Save) -> Sequence[Mark]:
        store, cache = self._stored(), self._core.cache
        while cache.lengths[order.slot] < order.end:  # noqa: ASYNC110  (its last step is)
            await trio.sleep(SETTLE_SECONDS)
        return await store.save(order, lambda positions: cache.export(order.slot, positions))

    def _stored(self) -> SlotStore:
        if self._store is None:
            raise StoreError("this stage has no store of sessions (--kv-store)")
        return self._store
