"""Run with kill_at_write.so preloaded: writers that die at each of their writes, and what is left.

Usage: kill_rig.py LIBRARY URL SEED NUM_OPERATIONS FIRST STEP
"""

import ctypes
import os
import sys

import trio

from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.store_url import open_store
from tests.pipeline.sessions.store_model import content, operations, outcomes

LIMITS = StoreLimits(100, 10_000, 4)
START = 1_800_000_000.0


class Clock:
    now = START

    def __call__(self):
        return self.now


async def write_until_killed(url, seed, count, acknowledge):
    clock = Clock()
    async with open_store(url, LIMITS, clock) as store:
        for operation in operations(seed, count):
            clock.now += operation.pause
            try:
                await operation.on_store(store)
            except Exception as error:
                if type(error).__name__ not in {"MissingChunk", "TooLarge"}:
                    raise
            acknowledge()


async def content_at(url, now):
    clock = Clock()
    clock.now = now
    async with open_store(url, LIMITS, clock) as store:
        return await content(store)


async def clear(url):
    clock = Clock()
    async with open_store(url, LIMITS, clock) as store:
        for each in await store.sessions():
            await store.forget(each.name)


def check(url, seed, count, num_acknowledged):
    expected, now = outcomes(LIMITS, START, seed, count, num_acknowledged)
    found = trio.run(content_at, url, now)
    assert found in expected, f"seed {seed}: wrong after {num_acknowledged} operations"


def run_child(library, url, seed, count, kill_at):
    """Whether it was killed, and how much it had acknowledged."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        library.arm(kill_at)
        trio.run(write_until_killed, url, seed, count, lambda: os.write(sending, b"."))
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        num_acknowledged = len(pipe.read())
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "the writer failed"
    return os.WIFSIGNALED(status), num_acknowledged


def main():
    library, url = ctypes.CDLL(sys.argv[1]), sys.argv[2]
    seed, count, first, step = map(int, sys.argv[3:])
    num_kills, is_killed, kill_at = 0, True, first
    while is_killed:
        trio.run(clear, url)
        is_killed, num_acknowledged = run_child(library, url, seed, count, kill_at)
        check(url, seed, count, num_acknowledged)
        num_kills += is_killed
        kill_at += step
    print(num_kills)


main()
