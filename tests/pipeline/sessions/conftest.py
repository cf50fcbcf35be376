"""Stores of each kind, and a Redis server of the test's own."""

import shutil
import subprocess
import time
from contextlib import asynccontextmanager

import pytest
import trio

from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.store_url import open_store

LIMITS = StoreLimits(ttl_seconds=100, max_bytes=10_000, max_sessions=4)


class RedisServer:
    """A server on a socket in a directory; it keeps what it acknowledges, across deaths."""

    def __init__(self, directory, *options):
        self.socket = directory / "redis"
        self.url = f"unix://{self.socket}"
        self._options = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(directory)]
        self._options += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *options]
        self.process = None

    def start(self):
        self.socket.unlink(missing_ok=True)
        command = [shutil.which("redis-server"), *self._options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while not self._is_loaded():
            assert self.process.poll() is None, "redis-server has ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _is_loaded(self):
        import socket

        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self.socket))
            except OSError:
                return False
            sock.sendall(b"PING\r\n")
            return sock.recv(64).startswith(b"+PONG")

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


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
        import socket

        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(server.socket))
            sock.sendall(b"FLUSHALL\r\n")
            assert sock.recv(64).startswith(b"+OK")
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
