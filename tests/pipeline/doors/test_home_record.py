"""A later run goes on from what a door has stored, where both sides still have it."""

from dataclasses import replace

import pytest

from pipeline.doors.door_session import SessionName
from pipeline.doors.home_record import HomeRecord, Remembered
from pipeline.doors.kept_state import SAVE_POSITIONS, KeptMark
from pipeline.protocol.stored_state import Mark
from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.store_url import open_store
from tests.pipeline.doors.rig import PROMPT, SECRET, Wire, generate, model

__all__ = ["model"]

NAME = SessionName.of("chat", SECRET)
CORE = bytes(32)
REMEMBERED = Remembered(tuple(range(40)), KeptMark(3, Mark(40, bytes(range(32)))))


@pytest.fixture
def record(tmp_path):
    return HomeRecord(tmp_path / "record", NAME, CORE)


def test_what_is_remembered_is_read_again_by_its_owner_alone(record, tmp_path):
    assert record.load() is None
    record.save(REMEMBERED)
    assert record.load() == REMEMBERED
    path = tmp_path / "record"
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"\1\0\0\0\2\0\0\0" not in path.read_bytes()
    assert HomeRecord(path, SessionName.of("chat", b"x" * 32), CORE).load() is None
    assert HomeRecord(path, NAME, b"\1" * 32).load() is None
    record.save(None)
    assert not path.exists()
    record.save(None)


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-8], lambda data: b"A" * len(data), lambda data: b"\xff"],
    ids=["empty", "cut", "other", "no base64"],
)
def test_a_damaged_record_is_as_good_as_none(record, tmp_path, damage):
    record.save(REMEMBERED)
    path = tmp_path / "record"
    path.write_bytes(damage(path.read_bytes()))
    assert record.load() is None


def test_a_mark_of_other_tokens_is_not_believed(record):
    record.save(replace(REMEMBERED, token_ids=REMEMBERED.token_ids[:-1]))
    assert record.load() is None


class Runs:
    """One run of a client after another, each at a door of its own over one store."""

    def __init__(self, model, store):
        self.model, self.store, self.remembered = model, store, None

    async def run(self, prompt, num_tokens=8, **changes):
        """Its tokens, and how many were sent for them."""
        async with self.model.door(**({"store": self.store} | changes)) as door:
            wire = Wire(door)
            pipeline = self.model.pipeline(wire, remembered=self.remembered)
            tokens = await generate(pipeline, prompt=prompt, num_tokens=num_tokens)
            self.remembered = pipeline.remembered
        return tokens, sum(each.shape[0] for each in wire.requests)


@pytest.fixture
async def runs(model):
    async with open_store("memory:", StoreLimits()) as store:
        yield Runs(model, store)


async def cold(model, prompt):
    async with model.door() as door:
        return await generate(model.pipeline(door), prompt=prompt, num_tokens=8)


async def test_a_second_turn_sends_only_what_is_new(model, runs):
    first, num_sent = await runs.run(PROMPT)
    assert num_sent == len(PROMPT) + 7
    turn = (*PROMPT, *first, *range(10, 20))
    second, num_sent = await runs.run(turn)
    assert second == await cold(model, turn)
    assert num_sent < 10 + 8 + 7 + SAVE_POSITIONS
    third, num_sent = await runs.run(turn)  # the same again: but for its last token all is there
    assert third == second
    assert num_sent < 8 + 7 + SAVE_POSITIONS
    for _ in range(3):  # and stays there
        again, num_again = await runs.run(turn)
        assert (again, num_again) == (third, num_sent)


async def test_a_turn_that_leaves_the_text_goes_on_from_where_it_does(model, runs):
    await runs.run(PROMPT)
    other = (*PROMPT[:30], 7, *PROMPT[31:])
    found, num_sent = await runs.run(other)
    assert found == await cold(model, other)
    assert num_sent == len(PROMPT) - 30 + 7
    unlike = tuple(range(200, 240))
    assert (await runs.run(unlike))[0] == await cold(model, unlike)
    assert (await runs.run(PROMPT))[0] == await cold(model, PROMPT)


async def test_what_a_door_has_lost_since_is_sent_whole(model, runs):
    first, _ = await runs.run(PROMPT)
    turn = (*PROMPT, *first)
    for each in await runs.store.sessions():
        await runs.store.forget(each.name)
    found, num_sent = await runs.run(turn)
    assert found == await cold(model, turn)
    assert num_sent >= len(turn) + 7
    found, _ = await runs.run(turn, store=None)
    assert found == await cold(model, turn)
    assert runs.remembered is None
    assert (await runs.run(turn))[0] == found
    assert runs.remembered is not None


async def test_a_second_request_of_one_run_sends_only_what_is_new(model):
    async with model.door() as door:
        wire = Wire(door)
        pipeline = model.pipeline(wire)
        first = await generate(pipeline, num_tokens=8)
        before = len(wire.requests)
        turn = (*PROMPT, *first, 5, 6)
        second = await generate(pipeline, prompt=turn, num_tokens=8)
        assert sum(each.shape[0] for each in wire.requests[before:]) == 1 + 2 + 7
    assert second == await cold(model, turn)
