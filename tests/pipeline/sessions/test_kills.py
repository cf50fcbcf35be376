"""A store whose writer is killed at any of its writes holds whole what was acknowledged."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import InputError, StoreError
from pipeline.sessions.kv_store import MissingChunk, StoreLimits, TooLarge
from pipeline.sessions.store_url import open_store
from tests.pipeline.sessions.store_model import content, operations, outcomes

LIMITS = StoreLimits(100, 10_000, 4)
HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build what kills a writer")
    path = tmp_path_factory.mktemp("kill") / "kill_at_write.so"
    command = [compiler, "-shared", "-fPIC", "-O1", str(HERE / "kill_at_write.c"), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(params=["file", "redis"])
def url(request, tmp_path):
    if request.param == "redis":
        return request.getfixturevalue("redis_server").url
    return f"file:{tmp_path / 'store'}"


def run_rig(library, url, seed, num_operations, first, step):
    """How often the writer was killed."""
    numbers = map(str, (seed, num_operations, first, step))
    command = [sys.executable, str(HERE / "kill_rig.py"), str(library), url, *numbers]
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_writer_that_dies_leaves_what_was_acknowledged_whole(library, url):
    assert run_rig(library, url, seed=1, num_operations=25, first=1, step=7) > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_writer_may_die_at_each_of_its_writes(library, url, seed):
    assert run_rig(library, url, seed, num_operations=40, first=0, step=1) >= 40


async def check_dying_redis(server, library, clock, seed, kill_at):
    """Whether it died, of 40 operations."""
    start = clock.now
    server.start(LD_PRELOAD=str(library), KILL_AT_WRITE=str(kill_at))
    num_acknowledged = 0
    try:
        async with open_store(server.url, LIMITS, clock) as store:
            for operation in operations(seed, 40):
                clock.now += operation.pause
                with suppress(MissingChunk, TooLarge):
                    await operation.on_store(store)
                num_acknowledged += 1
    except (StoreError, InputError):
        pass
    has_died = num_acknowledged < 40
    server.stop()
    server.start()
    expected, clock.now = outcomes(LIMITS, start, seed, 40, num_acknowledged)
    async with open_store(server.url, LIMITS, clock) as store:
        assert await content(store) in expected
        for each in await store.sessions():
            await store.forget(each.name)
    server.stop()
    return has_died


async def test_a_redis_that_dies_comes_back_with_what_was_acknowledged(
    redis_server, library, clock
):
    redis_server.stop()
    for kill_at in (4, 11):
        assert await check_dying_redis(redis_server, library, clock, seed=2, kill_at=kill_at)


@pytest.mark.slow
async def test_a_redis_may_die_at_each_of_its_writes(redis_server, library, clock):
    redis_server.stop()
    kill_at = 0
    while await check_dying_redis(redis_server, library, clock, seed=2, kill_at=kill_at):
        kill_at += 1
    assert kill_at > 15
