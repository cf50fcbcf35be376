"""What a store of any kind does: against a model of it, and at its limits."""

import pytest

from pipeline.errors import InputError, StoreError
from pipeline.sessions.kv_store import MissingChunk, StoreLimits, TooLarge
from pipeline.sessions.store_url import open_store
from tests.pipeline.sessions.store_model import NAMES, Model, operations


def name_at(found):
    return [each.name for each in found]


async def test_what_was_written_is_read_and_nothing_else(opened):
    async with opened() as store:
        await store.write(NAMES[0], 0, [b"a", b"bb"])
        await store.write(NAMES[0], 1, [b"\x00\xff", b""])
        assert list(await store.read(NAMES[0], 0)) == [b"a", b"bb"]
        assert list(await store.read(NAMES[0], 1)) == [b"\x00\xff", b""]
        assert await store.read(NAMES[0], 2) is None
        assert await store.read(NAMES[1], 0) is None


async def test_a_chunk_that_is_written_again_is_the_last_one(opened):
    async with opened() as store:
        for index in range(4):
            await store.write(NAMES[0], index, [bytes([index]) * 10])
        await store.write(NAMES[0], 1, [b"new", b"layer"])
        assert list(await store.read(NAMES[0], 0)) == [bytes(10)]
        assert list(await store.read(NAMES[0], 1)) == [b"new", b"layer"]
        assert await store.read(NAMES[0], 2) is None
        (session,) = await store.sessions()
        assert (session.num_bytes, session.num_chunks) == (18, 2)


async def test_a_chunk_behind_a_gap_is_refused(opened):
    async with opened() as store:
        with pytest.raises(MissingChunk):
            await store.write(NAMES[0], 1, [b"a"])
        await store.write(NAMES[0], 0, [b"a"])
        await store.forget(NAMES[0])
        with pytest.raises(MissingChunk):
            await store.write(NAMES[0], 1, [b"a"])
        assert await store.sessions() == []


async def test_a_session_that_nobody_uses_is_gone(opened, clock):
    async with opened() as store:
        await store.write(NAMES[0], 0, [b"a"])
        await store.write(NAMES[1], 0, [b"b"])
        clock.now += 60
        await store.read(NAMES[1], 0)
        clock.now += 60
        assert await store.read(NAMES[0], 0) is None
        assert name_at(await store.sessions()) == [NAMES[1]]
        with pytest.raises(MissingChunk):
            await store.write(NAMES[0], 1, [b"a"])


async def test_a_clock_that_is_set_back_loses_nothing(opened, clock):
    async with opened() as store:
        await store.write(NAMES[0], 0, [b"a"])
        clock.now -= 100_000
        assert list(await store.read(NAMES[0], 0)) == [b"a"]


async def test_whoever_was_used_longest_ago_goes_first(opened, clock):
    async with opened() as store:
        for name in NAMES[:4]:
            clock.now += 1
            await store.write(name, 0, [b"a"])
        clock.now += 1
        await store.read(NAMES[0], 0)
        clock.now += 1
        await store.write(NAMES[4], 0, [b"a"])
        assert name_at(await store.sessions()) == [NAMES[2], NAMES[3], NAMES[0], NAMES[4]]


async def test_bytes_are_kept_within_their_limit(opened, clock):
    async with opened() as store:
        for name in NAMES[:2]:
            clock.now += 1
            await store.write(name, 0, [bytes(4000)])
        clock.now += 1
        await store.write(NAMES[0], 1, [bytes(3000)])
        assert name_at(await store.sessions()) == [NAMES[0]]
        with pytest.raises(TooLarge):
            await store.write(NAMES[0], 2, [bytes(3001)])
        assert await store.read(NAMES[0], 1) is not None


async def test_a_store_keeps_what_it_has_when_it_is_opened_again(opened, store_url):
    async with opened() as store:
        await store.write(NAMES[0], 0, [b"a", b"b"])
    async with opened() as store:
        found = await store.read(NAMES[0], 0)
    assert (found is None) is (store_url == "memory:")


async def run_at_random(store, clock, seed, num_operations):
    model = Model(StoreLimits(100, 10_000, 4))
    for operation in operations(seed, num_operations):
        clock.now += operation.pause
        expected = operation.on_model(model, clock.now)
        try:
            found = await operation.on_store(store)
        except StoreError as error:
            found = type(error)
        assert found == expected
        assert await state_of(store) == model.state()


async def state_of(store):
    return {each.name: (each.num_bytes, each.num_chunks) for each in await store.sessions()}


async def test_random_operations_do_what_a_model_does(opened, clock):
    async with opened(StoreLimits(100, 10_000, 4)) as store:
        await run_at_random(store, clock, seed=1, num_operations=150)


@pytest.mark.slow
async def test_ten_thousand_random_operations_do_what_a_model_does(opened, clock):
    async with opened(StoreLimits(100, 10_000, 4), seconds=1000) as store:
        for seed in range(10):
            await run_at_random(store, clock, seed, num_operations=1000)
            for name in NAMES:
                await store.forget(name)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nowhere", "a store of sessions is memory:, file:DIR"),
        ("file:", "a store of sessions is"),
        ("memory:x", "a store of sessions is"),
        ("http://host", "a store of sessions is"),
        ("file:/dev/null/store", "cannot keep sessions in /dev/null/store"),
        ("file:a\0b", "cannot keep sessions in"),
        ("redis://host:99999", "cannot use this Redis"),
    ],
)
async def test_a_store_that_cannot_be_is_one_clear_error(url, told):
    with pytest.raises(InputError, match=told):
        async with open_store(url, StoreLimits()):
            pass


async def test_a_file_that_is_no_store_is_one_clear_error(tmp_path):
    (tmp_path / "sessions.sqlite3").write_bytes(b"something else " * 1000)
    with pytest.raises(InputError, match="cannot keep sessions in"):
        async with open_store(f"file:{tmp_path}", StoreLimits()):
            pass


async def test_a_file_that_breaks_later_is_a_store_error(tmp_path):
    async with open_store(f"file:{tmp_path}", StoreLimits()) as store:
        await store.write(NAMES[0], 0, [bytes(100_000)])
    path = tmp_path / "sessions.sqlite3"
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StoreError):
        async with open_store(f"file:{tmp_path}", StoreLimits()) as store:
            await store.read(NAMES[0], 0)


async def test_a_stores_file_is_its_owners_alone(tmp_path):
    directory = tmp_path / "store"
    async with open_store(f"file:{directory}", StoreLimits()) as store:
        await store.write(NAMES[0], 0, [b"a"])
        modes = {path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert modes == {0o600}
    assert directory.stat().st_mode & 0o777 == 0o700
