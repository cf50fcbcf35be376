"""Stores of each kind."""

import shutil
from contextlib import asynccontextmanager

import pytest
import trio

from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.store_url import open_store
from tests.pipeline.sessions.redis_server import RedisServer

LIMITS = StoreLimits(ttl_seconds=100, max_bytes=10_000, max_sessions=4)


@pytest.fixture(scope="session")
def redis_directory(tmp_path_factory):
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    return tmp_path_factory.mktemp("redis")


@pytest.fixture
def redis_server(redis_directory, tmp_path_factory):
    """A server that a test may kill."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shared_redis(redis_directory):
    server = RedisServer(redis_directory)
    server.start()
    yield server
    server.stop()


class Clock:
    """A wall clock that a test sets."""

    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["memory", "file", "redis"])
def store_url(request, tmp_path):
    if request.param == "redis":
        server = request.getfixturevalue("shared_redis")
        assert server.ask("FLUSHALL").startswith(b"+OK")
        return server.url
    return "memory:" if request.param == "memory" else f"file:{tmp_path / 'store'}"


@pytest.fixture
def opened(store_url, clock):
    """Opens the store, with limits if need be."""

    @asynccontextmanager
    async def open_one(limits=LIMITS, seconds=30):
        with trio.fail_after(seconds):
            async with open_store(store_url, limits, clock) as store:
                yield store

    return open_one
