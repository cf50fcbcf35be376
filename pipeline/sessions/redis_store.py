"""Sessions in Redis, which may be slow, full, flushed or gone, and is trusted with nothing."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import trio
from coredis import Redis
from coredis.commands import Script
from coredis.exceptions import ConnectionError, ProtocolError, RedisError  # noqa: A004

from pipeline.errors import InputError, StoreError
from pipeline.sessions.kv_store import (
    MissingChunk,
    StoredSession,
    StoreLimits,
    TooLarge,
)
from pipeline.sessions.sealing import Chunk
from pipeline.tasks import open_tasks

logger = logging.getLogger(__name__)

# Of each key. A session is a hash: `bytes`, `chunks`, for each chunk i `i:layers`, and `i:0`, `i:1`
# ... its blobs. When each was last used is a sorted set, and who is not in there does not exist: a
# Redis that died in the midst of writing its file may have run half a script once it is back.
PREFIX = b"veilpipe:kv:"
# Redis runs a script as a whole or not at all, and nothing else meanwhile.
_COMMON = """
local prefix, oldest = ARGV[1], ARGV[2]
local used = prefix .. 'used'
local function drop(name)
  redis.call('DEL', prefix .. name)
  redis.call('ZREM', used, name)
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', used, '-inf', '(' .. oldest)) do drop(name) end
local function number(name, field)
  return tonumber(redis.call('HGET', prefix .. name, field) or 0)
end
local function touch(name, now, ttl)
  redis.call('PEXPIRE', prefix .. name, ttl)
  redis.call('ZADD', used, now, name)
end
"""
_WRITE = (
    _COMMON
    + """
local now, ttl, name, index, max_bytes, max_sessions =
  ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local first = 9
local key = prefix .. name
if not redis.call('ZSCORE', used, name) and redis.call('EXISTS', key) == 1 then
  redis.call('DEL', key)
end
local chunks, bytes, behind = number(name, 'chunks'), number(name, 'bytes'), {}
if index > chunks then return {-1, 0} end
for chunk = index, chunks - 1 do
  for layer = 0, number(name, chunk .. ':layers') - 1 do
    local field = chunk .. ':' .. layer
    bytes = bytes - redis.call('HSTRLEN', key, field)
    behind[#behind + 1] = field
  end
  behind[#behind + 1] = chunk .. ':layers'
end
for at = first, #ARGV do bytes = bytes + #ARGV[at] end
if bytes > max_bytes then return {-2, bytes} end
redis.call('HSET', key, 'bytes', bytes)  -- refused if memory is full, while nothing is changed
local others, total = {}, bytes
for _, other in ipairs(redis.call('ZRANGE', used, 0, -1)) do
  if other ~= name then
    if redis.call('EXISTS', prefix .. other) == 1 then
      others[#others + 1] = other
      total = total + number(other, 'bytes')
    else
      redis.call('ZREM', used, other)
    end
  end
end
for at, other in ipairs(others) do
  if total <= max_bytes and #others - at + 1 < max_sessions then break end
  total = total - number(other, 'bytes')
  drop(other)
end
redis.call('ZREM', used, name)
for _, field in ipairs(behind) do redis.call('HDEL', key, field) end
redis.call('HSET', key, 'chunks', index + 1, index .. ':layers', #ARGV - first + 1)
for at = first, #ARGV do redis.call('HSET', key, index .. ':' .. (at - first), ARGV[at]) end
touch(name, now, ttl)
return {0, bytes}
"""
)
_READ = (
    _COMMON
    + """
local now, ttl, name, index = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local blobs = {}
if not redis.call('ZSCORE', used, name) then return blobs end
for layer = 0, number(name, index .. ':layers') - 1 do
  local blob = redis.call('HGET', prefix .. name, index .. ':' .. layer)
  if not blob then return {} end
  blobs[layer + 1] = blob
end
if #blobs > 0 then touch(name, now, ttl) end
return blobs
"""
)
_FORGET = _COMMON + "drop(ARGV[3])"
_SESSIONS = (
    _COMMON
    + """
local found = {}
for _, name in ipairs(redis.call('ZRANGE', used, 0, -1)) do
  if redis.call('EXISTS', prefix .. name) == 1 then
    local score = redis.call('ZSCORE', used, name)
    found[#found + 1] = {name, number(name, 'bytes'), number(name, 'chunks'), score}
  end
end
return found
"""
)


class RedisStore:
    """Each call is one script. What is acknowledged lasts as long as Redis is set up to keep it.

    Limits hold for all who use the same database.
    """

    def __init__(
        self, client: Redis[bytes], limits: StoreLimits, clock: Callable[[], float] = time.time
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._write_script = client.register_script(_WRITE)
        self._read_script = client.register_script(_READ)
        self._forget_script = client.register_script(_FORGET)
        self._sessions_script = client.register_script(_SESSIONS)

    async def write(self, name: bytes, index: int, chunk: Chunk) -> None:
        """Write a chunk. Raises StoreError, as `KVStore.write` does."""
        limits = self._limits
        bounds = limits.max_bytes, limits.max_sessions
        code, num_bytes = await self._run(
            self._write_script, *self._now(), name.hex(), index, *bounds, *chunk
        )
        if code == -1:
            raise MissingChunk
        if code == -2:
            raise TooLarge(num_bytes, limits.max_bytes)

    async def read(self, name: bytes, index: int) -> Chunk | None:
        """See `KVStore.read`."""
        chunk: Chunk = await self._run(self._read_script, *self._now(), name.hex(), index)
        return chunk or None

    async def forget(self, name: bytes) -> None:
        """See `KVStore.forget`."""
        await self._run(self._forget_script, name.hex())

    async def sessions(self) -> Sequence[StoredSession]:
        """See `KVStore.sessions`."""
        found = await self._run(self._sessions_script)
        return [
            StoredSession(bytes.fromhex(name.decode()), num_bytes, num_chunks, float(used_at))
            for name, num_bytes, num_chunks, used_at in found
        ]

    def _now(self) -> tuple[float, int]:
        """The time, and for how many milliseconds a session is kept from now on."""
        return self._clock(), max(1, round(self._limits.ttl_seconds * 1000))

    async def _run(self, script: Script[bytes], *values: str | bytes | float) -> Any:  # noqa: ANN401
        oldest = self._clock() - self._limits.ttl_seconds
        try:
            return await script([], [PREFIX, oldest, *values])
        except (RedisError, OSError) as error:
            raise StoreError(f"the store of sessions fails: {error}") from error


@asynccontextmanager
async def open_redis(
    url: str, limits: StoreLimits, clock: Callable[[], float] = time.time
) -> AsyncIterator[RedisStore]:
    """The store at redis://, rediss:// or unix://, while the context is open. Raises InputError.

    One that is away is no error: it may come, and until then each call is one.
    """
    try:
        _ = urlsplit(url).port  # which only looks whether it is a port's number
        client: Redis[bytes] = Redis.from_url(url)
    except (ValueError, TypeError) as error:
        raise InputError(f"cannot use this Redis: {error}") from error
    try:
        async with open_tasks() as tasks:
            await tasks.start(_hold, client)
            yield RedisStore(client, limits, clock)
            tasks.cancel_scope.cancel()
    except RedisError as error:
        raise InputError(f"cannot use this Redis: {error}") from error


async def _hold(client: Redis[bytes], task_status: trio.TaskStatus[None]) -> None:
    """Keep it open in a task of its own, since its connections are tasks too."""
    async with client:
        try:
            await client.ping()
        except ProtocolError:
            raise
        except ConnectionError as error:
            logger.warning("event=store_away error=%s; sessions are kept once it is back", error)
        task_status.started()
        await trio.sleep_forever()
