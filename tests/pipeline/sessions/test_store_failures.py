"""Stores that are full, slow, flushed or gone: one error, and the next call may succeed."""

import resource
import signal
from contextlib import contextmanager
from functools import partial

import pytest
import trio

from pipeline.errors import InputError, StoreError
from pipeline.sessions.kv_store import MissingChunk, StoreLimits
from pipeline.sessions.store_url import open_store

NAME, OTHER = b"n" * 32, b"o" * 32


@contextmanager
def full_disk():
    """No file may grow beyond 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def test_a_full_disk_loses_nothing_that_was_there(tmp_path):
    async with open_store(f"file:{tmp_path}", StoreLimits()) as store:
        await store.write(NAME, 0, [b"a"])
        with full_disk():
            for index in (0, 1):
                with pytest.raises(StoreError):
                    await store.write(NAME, index, [bytes(200_000)])
        assert list(await store.read(NAME, 0)) == [b"a"]
        await store.write(NAME, 1, [bytes(200_000)])
    async with open_store(f"file:{tmp_path}", StoreLimits()) as store:
        assert [each.num_chunks for each in await store.sessions()] == [2]


async def test_two_who_use_one_file_see_each_other(tmp_path):
    url = f"file:{tmp_path}"
    async with open_store(url, StoreLimits()) as one, open_store(url, StoreLimits()) as other:
        async with trio.open_nursery() as tasks:
            for index in range(20):
                tasks.start_soon(one.write, NAME, 0, [bytes([index])])
                tasks.start_soon(other.write, OTHER, 0, [bytes([index])])
        assert len(await one.sessions()) == 2
        assert await one.read(NAME, 0) == await other.read(NAME, 0)


async def test_a_redis_that_went_away_is_used_again_once_it_is_back(redis_server):
    async with open_store(redis_server.url, StoreLimits()) as store:
        await store.write(NAME, 0, [b"a"])
        redis_server.stop()
        with trio.fail_after(120), pytest.raises(StoreError):
            await store.read(NAME, 0)
        redis_server.start()
        assert list(await store.read(NAME, 0)) == [b"a"]


async def test_a_redis_that_is_away_at_the_start_is_said_once_and_used_once_it_comes(
    redis_server, caplog
):
    redis_server.stop()
    async with open_store(redis_server.url, StoreLimits()) as store:
        for _ in range(3):
            with pytest.raises(StoreError):
                await store.read(NAME, 0)
        redis_server.start()
        await store.write(NAME, 0, [b"a"])
        assert list(await store.read(NAME, 0)) == [b"a"]
    told = [each.levelname for each in caplog.records if each.name.startswith("pipeline.")]
    assert told == ["WARNING"]
    assert "event=store_away" in caplog.text


async def test_what_answers_and_is_no_redis_is_the_users_error():
    async def talk(stream):
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, talk, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(60), pytest.raises(InputError, match="cannot use this Redis"):
            async with open_store(f"redis://127.0.0.1:{port}", StoreLimits()):
                pass
        nursery.cancel_scope.cancel()


async def test_a_redis_that_answers_nothing_can_be_given_up(redis_server):
    async with open_store(redis_server.url, StoreLimits()) as store:
        await store.write(NAME, 0, [b"a"])
        redis_server.process.send_signal(signal.SIGSTOP)
        with trio.move_on_after(0.2) as scope:
            await store.read(NAME, 0)
        redis_server.process.send_signal(signal.SIGCONT)
        assert scope.cancelled_caught
        assert list(await store.read(NAME, 0)) == [b"a"]


async def test_a_flushed_redis_has_gaps(redis_server):
    async with open_store(redis_server.url, StoreLimits()) as store:
        await store.write(NAME, 0, [b"a"])
        redis_server.ask("FLUSHALL")
        assert await store.read(NAME, 0) is None
        with pytest.raises(MissingChunk):
            await store.write(NAME, 1, [b"b"])


async def test_a_full_redis_loses_nothing_that_was_there(redis_server):
    async with open_store(redis_server.url, StoreLimits()) as store:
        await store.write(NAME, 0, [b"a"])
        redis_server.ask("CONFIG SET maxmemory 1")
        for name, index in ((NAME, 1), (OTHER, 0)):
            with pytest.raises(StoreError):
                await store.write(name, index, [bytes(1000)])
        redis_server.ask("CONFIG SET maxmemory 0")
        assert list(await store.read(NAME, 0)) == [b"a"]
        (session,) = await store.sessions()
        assert (session.num_chunks, session.num_bytes) == (1, 1)


async def test_sessions_that_redis_has_evicted_are_not_counted(redis_server):
    async with open_store(redis_server.url, StoreLimits(max_sessions=2)) as store:
        await store.write(NAME, 0, [b"a"])
        await store.write(OTHER, 0, [b"b"])
        redis_server.ask(f"DEL veilpipe:kv:{NAME.hex()}")
        assert [each.name for each in await store.sessions()] == [OTHER]
        await store.write(b"x" * 32, 0, [b"c"])
        assert [each.name for each in await store.sessions()] == [OTHER, b"x" * 32]
