"""Sessions in a file, or in memory, by SQLite: the store that is always there."""

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TypeVar

import trio

from pipeline.errors import InputError, StoreError
from pipeline.sessions.kv_store import (
    MissingChunk,
    StoredSession,
    StoreLimits,
    TooLarge,
    chunk_bytes,
    surplus,
)
from pipeline.sessions.sealing import Chunk

FILE_NAME = "sessions.sqlite3"
# Several workers may share a file; none holds it for longer than a chunk takes to write.
BUSY_SECONDS = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    name BLOB PRIMARY KEY, num_bytes INTEGER NOT NULL, num_chunks INTEGER NOT NULL,
    used_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blobs (
    name BLOB NOT NULL REFERENCES sessions ON DELETE CASCADE,
    chunk INTEGER NOT NULL, layer INTEGER NOT NULL, blob BLOB NOT NULL,
    UNIQUE (name, chunk, layer)
);
"""

T = TypeVar("T")


class SqliteStore:
    """A transaction for each call, on disk before it returns (WAL, synchronous=FULL).

    Calls run in threads, one at a time.
    """

    def __init__(
        self,
        directory: Path | None,
        limits: StoreLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """None keeps it all in memory. Raises InputError where no store can be there."""
        self._limits = limits
        self._clock = clock
        self._lock = Lock()
        where = ":memory:" if directory is None else _own_file(directory)
        try:
            self._database = sqlite3.connect(
                where, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise InputError(f"cannot keep sessions in {where}: {error}") from error

    async def write(self, name: bytes, index: int, chunk: Chunk) -> None:
        """See `KVStore.write`."""
        await self._run(lambda: self._write(name, index, chunk))

    async def read(self, name: bytes, index: int) -> Chunk | None:
        """See `KVStore.read`."""
        return await self._run(lambda: self._read(name, index))

    async def forget(self, name: bytes) -> None:
        """See `KVStore.forget`."""
        await self._run(lambda: self._drop([name]))

    async def sessions(self) -> Sequence[StoredSession]:
        """See `KVStore.sessions`."""
        return await self._run(self._fresh_sessions)

    def close(self) -> None:
        """Be done with it."""
        with self._lock:
            self._database.close()

    async def _run(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(self._transact, call)

    def _transact(self, call: Callable[[], T]) -> T:
        with self._lock:
            try:
                with _transaction(self._database):
                    return call()
            except sqlite3.Error as error:
                raise StoreError(f"the store of sessions fails: {error}") from error

    def _write(self, name: bytes, index: int, chunk: Chunk) -> None:
        sessions = {each.name: each for each in self._fresh_sessions()}
        own = sessions.pop(name, StoredSession(name, 0, 0, 0.0))
        if index > own.num_chunks:
            raise MissingChunk
        query = "SELECT coalesce(sum(length(blob)), 0) FROM blobs WHERE name = ? AND chunk >= ?"
        ((num_replaced,),) = self._execute(query, (name, index))
        num_bytes = own.num_bytes - num_replaced + chunk_bytes(chunk)
        if num_bytes > self._limits.max_bytes:
            raise TooLarge(num_bytes, self._limits.max_bytes)
        self._drop(surplus(sessions.values(), num_bytes, self._limits))
        self._execute("DELETE FROM blobs WHERE name = ? AND chunk >= ?", (name, index))
        self._execute(
            "INSERT INTO sessions VALUES (?1, ?2, ?3, ?4) ON CONFLICT (name) DO UPDATE"
            " SET num_bytes = ?2, num_chunks = ?3, used_at = ?4",
            (name, num_bytes, index + 1, self._clock()),
        )
        for layer, blob in enumerate(chunk):
            self._execute("INSERT INTO blobs VALUES (?, ?, ?, ?)", (name, index, layer, blob))

    def _read(self, name: bytes, index: int) -> Chunk | None:
        self._fresh_sessions()
        query = "SELECT blob FROM blobs WHERE name = ? AND chunk = ? ORDER BY layer"
        chunk = [blob for (blob,) in self._execute(query, (name, index))]
        if not chunk:
            return None
        self._execute("UPDATE sessions SET used_at = ? WHERE name = ?", (self._clock(), name))
        return chunk

    def _fresh_sessions(self) -> list[StoredSession]:
        """All of them, those that have not been used for too long being dropped."""
        self._execute(
            "DELETE FROM sessions WHERE used_at < ?", (self._clock() - self._limits.ttl_seconds,)
        )
        query = "SELECT name, num_bytes, num_chunks, used_at FROM sessions ORDER BY used_at, name"
        return [StoredSession(*row) for row in self._execute(query)]

    def _drop(self, names: Iterable[bytes]) -> None:
        for name in names:
            self._execute("DELETE FROM sessions WHERE name = ?", (name,))

    def _execute(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        return self._database.execute(statement, values)


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # a full disk has rolled it back already
            database.execute("ROLLBACK")
        raise


def _own_file(directory: Path) -> str:
    """The database's file, its owner's alone, as its journal will be."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / FILE_NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot keep sessions in {directory}: {reason}") from error
    return str(path)
