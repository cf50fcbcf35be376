"""What a door keeps of a session in a store, so that another worker, or a later one, goes on.

The store is trusted with nothing: home gets a mark of what has been put there with each answer, and
gives it back where a session goes on elsewhere. Rows behind the mark are sent again.
"""

import logging
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

import trio

from pipeline.doors.grants import derive
from pipeline.errors import MessageError, StateRefused, StoreError
from pipeline.protocol.stored_state import ROOT_BYTES, Mark
from pipeline.sessions.kv_store import KVStore, MissingChunk
from pipeline.sessions.sealed_session import Export, Restore, SealedSession
from pipeline.sessions.sealing import Place

logger = logging.getLogger(__name__)

# So many tokens are sent again at most; each write costs about as much as a small step.
SAVE_POSITIONS = 16
# A store that hangs costs an answer no more than this, and ever fewer answers.
STORE_SECONDS = 5.0
MAX_DOUBLINGS = 2
# Much may be stored, and rebuilding it takes its time as well.
LOAD_SECONDS = 30.0
# chunks u32 | position u32 | root
_MARK = Struct(f">II{ROOT_BYTES}s")
MARK_BYTES = _MARK.size
# Chunks are told apart by their roots, which home keeps: there is no second count of writes.
_EPOCH = 0


class KeptMark(NamedTuple):
    """What is stored: so many chunks, up to that mark."""

    num_chunks: int
    mark: Mark

    def pack(self) -> bytes:
        """As it travels behind the rows of a body."""
        return _MARK.pack(self.num_chunks, self.mark.position, self.mark.root)


def parse_mark(data: bytes) -> KeptMark | None:
    """What a body has behind its rows, if anything. Raises MessageError for what is no mark."""
    if not data:
        return None
    if len(data) != MARK_BYTES:
        raise MessageError(f"a mark has {MARK_BYTES} bytes, not {len(data)}")
    num_chunks, position, root = _MARK.unpack(data)
    return KeptMark(num_chunks, Mark(position, root))


class KeptState:
    """One session's chunks in a store, and the marks of those that are known to be there."""

    def __init__(self, store: KVStore, owner: bytes, place: Callable[[bytes], Place]) -> None:
        """`place`: where a session of that id is computed. Name and key are the owner's alone."""
        self._sealed = SealedSession(
            store, derive(owner, b"store"), place(derive(owner, b"stored"))
        )
        self._marks: list[KeptMark] = []
        # Where the next write is due, and how many have failed in a row: each is later than the one
        # before, or a store that hangs would be waited for with every step.
        self._due = SAVE_POSITIONS
        self._num_failed = 0

    @property
    def _interval(self) -> int:
        return SAVE_POSITIONS << min(self._num_failed, MAX_DOUBLINGS)

    @property
    def mark(self) -> bytes:
        """What home needs to know; empty where nothing is stored."""
        return self._marks[-1].pack() if self._marks else b""

    def cut(self, length: int) -> None:
        """Forget what lies behind so many positions: it is written over by the next save."""
        while self._marks and self._marks[-1].mark.position > length:
            self._marks.pop()
            stored = self._marks[-1].mark.position if self._marks else 0
            self._due = stored + SAVE_POSITIONS
        self._due = min(self._due, length + self._interval)

    async def save(self, held: int, export: Export) -> None:
        """Write what has come since the last time, if that is enough.

        A store that fails costs what it holds, and no step: the session goes on here.
        """
        if held < self._due:
            return
        last = self._marks[-1] if self._marks else KeptMark(0, self._sealed.start)
        try:
            with trio.fail_after(STORE_SECONDS):
                marks = await self._sealed.save(_EPOCH, *last, held, export)
        except MissingChunk:
            logger.warning("event=door_session_not_stored position=%d error=evicted", held)
            self._marks.clear()
            self._due = 0  # all of it, with the next step
            return
        except (StoreError, trio.TooSlowError) as error:
            self._num_failed += 1
            reason = str(error) or "too slow"
            logger.warning("event=door_session_not_stored position=%d error=%s", held, reason)
        else:
            self._num_failed = 0
            for number, mark in enumerate(marks, last.num_chunks + 1):
                self._marks.append(KeptMark(number, mark))
        self._due = held + self._interval

    async def load(self, kept: KeptMark, restore: Restore) -> None:
        """Restore all up to a mark. Raises StoreError, StateRefused."""
        try:
            with trio.fail_after(LOAD_SECONDS):
                await self._sealed.load(_EPOCH, *kept, kept.mark.position, restore)
        except trio.TooSlowError as error:
            raise StoreError("the store is too slow") from error
        except MessageError as error:  # authentic, and not of a cache like this one
            raise StateRefused(f"what is stored does not fit: {error}") from error
        self._marks = [kept]
        self._due = kept.mark.position + SAVE_POSITIONS

    async def forget(self) -> None:
        """Be rid of what is stored, as far as the store can be reached."""
        try:
            with trio.fail_after(STORE_SECONDS):
                await self._sealed.forget()
        except (StoreError, trio.TooSlowError) as error:
            logger.warning("event=door_session_not_forgotten error=%s", str(error) or "too slow")
