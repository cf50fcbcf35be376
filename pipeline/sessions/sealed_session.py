"""One stage's part of a session in a store: sealed going in, held to its root coming out."""

from collections.abc import Callable, Iterable, Sequence

import trio

from pipeline.errors import StateRefused
from pipeline.kernels.kv_storage import LayerKV
from pipeline.protocol.stored_state import Mark
from pipeline.sessions.kv_store import KVStore
from pipeline.sessions.sealing import CHUNK_POSITIONS, Cipher, Place, Seal, is_same

# Puts layers behind what a slot holds; the position is that of the first.
Restore = Callable[[int, Sequence[LayerKV]], None]
# Layers at consecutive positions of a slot.
Export = Callable[[range], Sequence[LayerKV]]


class SealedSession:
    """What `KVCache.export` gives, kept in a store, and what `KVCache.restore` takes."""

    def __init__(
        self, store: KVStore, key: bytes, place: Place, cipher: Cipher = Cipher.AES_256_GCM
    ) -> None:
        """`key` has 32 bytes, of this session and this stage alone."""
        self._store = store
        self._name = place.name
        self._seal = Seal(key, place, cipher)

    @property
    def start(self) -> Mark:
        """The mark before the first chunk."""
        return self._seal.start

    async def save(
        self, epoch: int, num_chunks: int, before: Mark, end: int, export: Export
    ) -> list[Mark]:
        """Write the positions from `before` to `end` behind the first `num_chunks` chunks.

        Returns the marks of what has been written, a chunk each. Raises StoreError; MissingChunk
        where chunks before it are gone. Then some may have been written that nobody knows of, which
        the next save replaces.
        """
        marks: list[Mark] = []
        for start in range(before.position, end, CHUNK_POSITIONS):
            layers = export(range(start, min(start + CHUNK_POSITIONS, end)))
            chunk, before = self._seal.seal(before, epoch, layers)
            await self._store.write(self._name, num_chunks + len(marks), chunk)
            marks.append(before)
        return marks

    async def load(
        self, epoch: int, num_chunks: int, last: Mark, length: int, restore: Restore
    ) -> None:
        """Restore the first `length` of the positions that end at `last`, chunk by chunk.

        Raises StateRefused where they are not those of the mark, and StoreError; what has been
        restored until then is then to be forgotten: the last chunk alone shows that all are right.
        """
        mark = self._seal.start
        for index in range(num_chunks):
            chunk = await self._store.read(self._name, index)
            # A read in a thread ends in spite of a cancellation; the slot may be another's then.
            await trio.lowlevel.checkpoint_if_cancelled()
            if chunk is None:
                raise StateRefused(f"what was stored from position {mark.position} on is gone")
            start = mark.position
            layers, mark = self._seal.open(mark, epoch, chunk)
            if start < length:
                restore(start, _first(layers, length - start))
        if not is_same(mark, last) or length > last.position:
            raise StateRefused("what is stored is not what was stored last")

    async def forget(self) -> None:
        """Be rid of it. Raises StoreError."""
        await self._store.forget(self._name)


def _first(layers: Iterable[LayerKV], num_positions: int) -> list[LayerKV]:
    return [LayerKV(keys[:, :num_positions], values[:, :num_positions]) for keys, values in layers]
