"""Which store is meant by what a user writes: memory:, file:DIR, or redis://HOST."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from pipeline.errors import InputError
from pipeline.sessions.kv_store import KVStore, StoreLimits

FORMS = "memory:, file:DIR, redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix://SOCKET"


@asynccontextmanager
async def open_store(
    url: str, limits: StoreLimits, clock: Callable[[], float] = time.time
) -> AsyncIterator[KVStore]:
    """The store of that name, while the context is open. Raises InputError."""
    scheme, _, rest = url.partition(":")
    if scheme in {"redis", "rediss", "unix"} and rest.startswith("//"):
        # A client and all it needs, for those who have a Redis.
        from pipeline.sessions.redis_store import open_redis  # noqa: PLC0415

        async with open_redis(url, limits, clock) as redis:
            yield redis
        return
    if (scheme == "memory" and rest) or (scheme == "file" and not rest) or scheme not in _LOCAL:
        raise InputError(f"a store of sessions is {FORMS}")
    from pipeline.sessions.sqlite_store import SqliteStore  # noqa: PLC0415

    store = SqliteStore(Path(rest) if scheme == "file" else None, limits, clock)
    try:
        yield store
    finally:
        store.close()


_LOCAL = frozenset({"memory", "file"})
