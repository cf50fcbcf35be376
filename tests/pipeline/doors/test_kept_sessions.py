"""A door that restarts goes on from its store where that is whole, and from tokens where not."""

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from pipeline.doors.kept_state import SAVE_POSITIONS, STORE_SECONDS, KeptMark, parse_mark
from pipeline.doors.messages import DoorFault
from pipeline.errors import MessageError, StoreError
from pipeline.protocol.stored_state import Mark
from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.store_url import open_store
from tests.pipeline.doors.rig import PROMPT, Wire, generate, model, refused

__all__ = ["model"]


class Doors(Wire):
    """A door that is stopped and started again before some requests."""

    def __init__(self, new_door, after):
        super().__init__(None)
        self._new_door, self._after = new_door, set(after)
        self._manager = trio.open_nursery()

    async def __aenter__(self):
        self._tasks = await self._manager.__aenter__()
        self.door = await self._tasks.start(self._run)
        return self

    async def __aexit__(self, *error):
        self._is_over.set()
        await self._manager.__aexit__(*error)

    async def _run(self, task_status):
        """One door, from its start to its stop, in a task of its own."""
        self._is_over, self._is_gone = trio.Event(), trio.Event()
        is_gone = self._is_gone
        async with self._new_door() as door:
            task_status.started(door)
            await self._is_over.wait()
        is_gone.set()

    async def infer(self, request):
        if len(self.requests) in self._after:
            self._after.discard(len(self.requests))
            self._is_over.set()
            await self._is_gone.wait()
            self.door = await self._tasks.start(self._run)
        return await super().infer(request)

    def num_tokens(self):
        return sum(each.shape[0] for each in self.requests)


class Meddling:
    """A store that somebody changes, or that fails."""

    def __init__(self, store):
        self._store = store
        self.written, self.read_chunk, self.is_down, self.is_slow = [], None, False, False

    async def _pass(self):
        if self.is_slow:
            await trio.sleep(3600)
        if self.is_down:
            raise StoreError("the store is down")

    async def write(self, name, index, chunk):
        await self._pass()
        self.written.append((name, index, chunk))
        await self._store.write(name, index, chunk)

    async def read(self, name, index):
        await self._pass()
        chunk = await self._store.read(name, index)
        return chunk if self.read_chunk is None else self.read_chunk(index, chunk)

    async def forget(self, name):
        await self._pass()
        await self._store.forget(name)

    async def sessions(self):
        return await self._store.sessions()


@pytest.fixture
async def store():
    async with open_store("memory:", StoreLimits()) as store:
        yield Meddling(store)


async def expected(model, num_tokens=40):
    async with model.door() as door:
        return await generate(model.pipeline(door), num_tokens=num_tokens)


@pytest.mark.parametrize("after", [{1}, {2}, {5, 6}, {20}, {8, 24, 25}], ids=str)
async def test_a_restarted_door_goes_on_where_its_store_ends(model, store, after):
    async with Doors(lambda: model.door(store=store), after) as doors:
        pipeline = model.pipeline(doors)
        assert await generate(pipeline, num_tokens=40) == await expected(model)
    again = doors.num_tokens() - len(PROMPT) - 39
    assert again <= (SAVE_POSITIONS + 16) * len(after)  # not the whole of it: that many in vain
    assert pipeline.stats.num_failovers >= 1
    assert pipeline.stats.num_handshakes == 1 + len(after)


async def test_a_file_outlives_the_process(model, tmp_path):
    @asynccontextmanager
    async def new_door():
        limits = StoreLimits()
        async with open_store(f"file:{tmp_path}", limits) as store, model.door(store=store) as door:
            yield door

    async with Doors(new_door, {4, 30}) as doors:
        assert await generate(model.pipeline(doors), num_tokens=40) == await expected(model)
    assert doors.num_tokens() < len(PROMPT) + 39 + 4 * SAVE_POSITIONS


async def test_only_what_is_new_is_written(model, store):
    async with model.door(store=store) as door:
        await generate(model.pipeline(door), num_tokens=40)
    indices = [index for _, index, _ in store.written]
    assert indices == list(range(len(indices)))
    assert len(indices) == (len(PROMPT) + 39) // SAVE_POSITIONS


SPOILED = {
    "gone": lambda store: lambda index, chunk: None,
    "cut": lambda store: lambda index, chunk: None if index == 3 else chunk,
    "swapped": lambda store: lambda index, chunk: store.written[index ^ 1][2],
    "changed": lambda store: (
        lambda index, chunk: [blob[:-1] + bytes([blob[-1] ^ 1]) for blob in chunk]
    ),
    "without a layer": lambda store: lambda index, chunk: chunk[:-1],
    "empty": lambda store: lambda index, chunk: [b""] * len(chunk),
}


@pytest.mark.parametrize("name", SPOILED)
async def test_what_a_store_spoils_is_rebuilt_from_tokens(model, store, name):
    store.read_chunk = SPOILED[name](store)
    async with Doors(lambda: model.door(store=store), {20}) as doors:
        pipeline = model.pipeline(doors)
        assert await generate(pipeline, num_tokens=40) == await expected(model)
    assert doors.num_tokens() >= 2 * len(PROMPT) + 39


async def test_an_older_state_put_back_is_refused(model, store):
    """The same prompt twice, so that all but the root would fit."""
    async with model.door(store=store) as door:
        await generate(model.pipeline(door), num_tokens=40)
    older = list(store.written)
    store.read_chunk = lambda index, chunk: older[index][2]
    async with Doors(lambda: model.door(store=store), {20}) as doors:
        assert await generate(model.pipeline(doors), num_tokens=40) == await expected(model)
    assert doors.num_tokens() >= 2 * len(PROMPT) + 39


@pytest.mark.parametrize("how", ["is_down", "is_slow"])
async def test_a_store_that_fails_costs_no_step(model, store, how, autojump_clock):
    class Breaking(Doors):
        async def infer(self, request):
            setattr(store, how, 8 <= len(self.requests) < 30)
            return await super().infer(request)

    async with Breaking(lambda: model.door(store=store), {12, 35}) as doors:
        assert await generate(model.pipeline(doors), num_tokens=40) == await expected(model)


async def test_a_store_that_hangs_is_waited_for_ever_less(model, store, autojump_clock):
    store.is_slow = True
    async with model.door(store=store) as door:
        pipeline = model.pipeline(door)
        await generate(pipeline, num_tokens=60)
        assert trio.current_time() < 1 + 4 * STORE_SECONDS
        store.is_slow = False
        other = tuple(range(200, 250))  # takes back all, and is soon stored again
        await generate(pipeline, prompt=other, num_tokens=60)
        assert len(store.written) >= 60 // SAVE_POSITIONS


async def test_a_store_that_is_emptied_is_filled_again(model, store):
    class Emptying(Doors):
        async def infer(self, request):
            if len(self.requests) in {8, 9}:
                for each in await store.sessions():
                    await store.forget(each.name)
            return await super().infer(request)

    async with Emptying(lambda: model.door(store=store), {35}) as doors:
        assert await generate(model.pipeline(doors), num_tokens=40) == await expected(model)
        assert doors.num_tokens() < len(PROMPT) + 39 + 2 * SAVE_POSITIONS


async def stored(model, door, secret=bytes(range(32))):
    """A session of which something is stored."""
    session = await model.session(door, secret=secret)
    session.open(await door.infer(session.seal(0, model.rows(20), 1)))
    assert session.num_stored == 20
    return session


async def test_another_owner_finds_nothing_of_it(model, store):
    async with model.door(store=store) as door:
        session = await stored(model, door)
    async with model.door(store=store) as door:
        other = await model.session(door, secret=b"x" * 32)
        other._name = replace(other._name, session_id=session._name.session_id)
        other.restart(session.mark)
        await refused(door, other.seal(20, model.rows(1), 1), DoorFault.UNKNOWN_SESSION)
        assert len(door._sessions) == 0


@pytest.mark.parametrize(
    ("mark", "fault"),
    [
        (KeptMark(1, Mark(19, bytes(32))), DoorFault.INVALID),
        (KeptMark(1, Mark(20, bytes(32))), DoorFault.UNKNOWN_SESSION),
        (KeptMark(0, Mark(20, bytes(32))), DoorFault.UNKNOWN_SESSION),
        (KeptMark(1 << 31, Mark(20, bytes(32))), DoorFault.UNKNOWN_SESSION),
    ],
    ids=str,
)
async def test_a_mark_of_something_else_leads_nowhere(model, store, mark, fault):
    async with model.door(store=store) as door:
        session = await stored(model, door)
        session.restart(mark)
        await refused(door, session.seal(20, model.rows(1), 1), fault)
        assert len(door._sessions) == 0


async def test_a_door_without_a_store_knows_no_marks(model, store):
    async with model.door(store=store) as door:
        session = await stored(model, door)
    async with model.door() as door:
        again = await model.session(door)
        again.restart(session.mark)
        await refused(door, again.seal(20, model.rows(1), 1), DoorFault.UNKNOWN_SESSION)


async def test_a_session_that_ends_leaves_nothing_in_the_store(model, store):
    async with model.door(store=store) as door:
        session = await stored(model, door)
        assert await store.sessions()
        session.open(await door.infer(session.seal(0, (), 0)))
        assert not await store.sessions()


async def test_what_is_stored_holds_no_keys_and_values_in_the_clear(model, store):
    async with model.door(store=store) as door:
        await stored(model, door)
        layers = door._cache.export(0, range(20))
    written = b"".join(blob for _, _, chunk in store.written for blob in chunk)
    for layer in layers:
        for array in layer:
            assert array.tobytes()[:32] not in written
    assert len(written) > sum(array.nbytes for layer in layers for array in layer)


def test_a_mark_has_one_length():
    mark = KeptMark(3, Mark(99, bytes(range(32))))
    assert parse_mark(mark.pack()) == mark
    assert parse_mark(b"") is None
    for data in (mark.pack()[:-1], mark.pack() + b"x"):
        with pytest.raises(MessageError, match="a mark has 40 bytes"):
            parse_mark(data)
