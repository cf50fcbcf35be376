"""What a store of any kind does: against a model of it, and at its limits."""

import random
from dataclasses import dataclass, field

import pytest

from pipeline.errors import InputError, StoreError
from pipeline.sessions.kv_store import MissingChunk, StoreLimits, TooLarge
from pipeline.sessions.store_url import open_store

NAMES = [bytes([number]) * 32 for number in range(6)]


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


@dataclass
class Model:
    """What a store ought to hold."""

    limits: StoreLimits
    used_at: dict = field(default_factory=dict)
    chunks: dict = field(default_factory=dict)

    def size(self, name):
        return sum(len(blob) for chunk in self.chunks[name] for blob in chunk)

    def forget(self, name):
        self.used_at.pop(name, None)
        self.chunks.pop(name, None)

    def expire(self, now):
        for name, used_at in list(self.used_at.items()):
            if used_at < now - self.limits.ttl_seconds:
                self.forget(name)

    def write(self, name, index, chunk, now):
        before = self.chunks.get(name, [])
        if index > len(before):
            return MissingChunk
        after = [*before[:index], chunk]
        size = sum(len(blob) for each in after for blob in each)
        if size > self.limits.max_bytes:
            return TooLarge
        self.chunks[name], self.used_at[name] = after, now
        order = sorted((used_at, each) for each, used_at in self.used_at.items() if each != name)
        for _, each in order:
            total = sum(map(self.size, self.chunks))
            if total > self.limits.max_bytes or len(self.chunks) > self.limits.max_sessions:
                self.forget(each)
        return None

    def read(self, name, index, now):
        found = self.chunks.get(name, [])[index : index + 1]
        if not found:
            return None
        self.used_at[name] = now
        return found[0]


async def run_at_random(store, clock, seed, num_operations):
    random_source, model = random.Random(seed), Model(StoreLimits(100, 10_000, 4))
    for _ in range(num_operations):
        clock.now += random_source.choice([0.25, 1.0, 10.0, 40.0])
        model.expire(clock.now)
        name, kind = random_source.choice(NAMES), random_source.random()
        if kind < 0.5:
            index = random_source.randrange(1 + len(model.chunks.get(name, [])) + 1)
            blobs = random_source.randrange(1, 4)
            sizes = [random_source.choice([0, 1, 300, 3000]) for _ in range(blobs)]
            chunk = [random_source.randbytes(size) for size in sizes]
            error = model.write(name, index, chunk, clock.now)
            if error is None:
                await store.write(name, index, chunk)
            else:
                with pytest.raises(error):
                    await store.write(name, index, chunk)
        elif kind < 0.9:
            index = random_source.randrange(4)
            expected = model.read(name, index, clock.now)
            found = await store.read(name, index)
            assert (None if found is None else list(found)) == expected
        elif kind < 0.95:
            model.forget(name)
            await store.forget(name)
        else:
            found = await store.sessions()
            assert {each.name: each.num_bytes for each in found} == {
                each: model.size(each) for each in model.chunks
            }


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
        ("redis://127.0.0.1:1", "cannot use this Redis"),
        ("redis://host:99999", "cannot use this Redis"),
        ("unix:///nowhere/redis", "cannot use this Redis"),
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
