"""A stage's store of sessions: each order is carried out under its own key."""

from collections.abc import Sequence
from dataclasses import replace

from pipeline.protocol.messages import Load, Save
from pipeline.protocol.stored_state import Mark
from pipeline.sessions.kv_store import KVStore
from pipeline.sessions.sealed_session import Export, Restore, SealedSession
from pipeline.sessions.sealing import Place


class StageStore:
    """Keeps no key and no root: both come with an order, and go with its answer."""

    def __init__(self, store: KVStore, place: Place) -> None:
        """`place`: of this stage, its session aside."""
        self._store = store
        self._place = place

    async def save(self, order: Save, export: Export) -> Sequence[Mark]:
        """Write the positions behind what is stored. Raises StoreError."""
        sealed = self._sealed(order)
        before = Mark(order.position, order.root) if order.num_chunks else sealed.start
        return await sealed.save(order.epoch, order.num_chunks, before, order.end, export)

    async def load(self, order: Load, restore: Restore) -> None:
        """Restore what is stored. Raises StateRefused and StoreError."""
        last = Mark(order.position, order.root)
        sealed = self._sealed(order)
        await sealed.load(order.epoch, order.num_chunks, last, order.length, restore)

    def _sealed(self, order: Save | Load) -> SealedSession:
        return SealedSession(self._store, order.key, replace(self._place, session=order.session))
