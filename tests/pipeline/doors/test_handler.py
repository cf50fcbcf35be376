"""A door computes a client's next step once, and nothing else; whatever it refuses costs nobody."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import trio

from pipeline.doors.door_keys import GRACE_SECONDS, LIFETIME_SECONDS
from pipeline.doors.door_session import DoorPolicy
from pipeline.doors.messages import AttestRequest, DoorError, DoorFault
from pipeline.errors import InputError, MessageError, SessionError
from pipeline.models.ends import NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from tests.pipeline.doors.rig import Model, begun, clock, goes_on, model, reference, refused

__all__ = ["clock", "model"]


async def test_rows_come_back_as_many_as_are_wanted(model):
    for num_rows in (0, 1, 5):
        async with model.door() as door:
            session = await model.session(door)
            rows = session.open(await door.infer(session.seal(0, model.rows(5), num_rows)))
            assert rows.shape == (num_rows, 64)
            expected = reference(model, (0, model.rows(5)))[5 - num_rows :]
            np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
            await goes_on(model, door, session)


async def test_an_answer_of_before_is_none_to_this_step(model):
    async with begun(model) as (door, session, _, first):
        request = session.seal(5, model.rows(5), 1)
        with pytest.raises(MessageError, match="does not open"):
            session.open(first)
        session.open(await door.infer(request))


async def test_a_request_sent_again_gets_the_very_answer_it_had(model):
    async with begun(model) as (door, session, request, answer):
        assert await door.infer(request) == answer
        assert await door.infer(replace(request, cloaked_embedding=memoryview(
            request.cloaked_embedding))) == answer  # fmt: skip
        await goes_on(model, door, session)
        await refused(door, request, DoorFault.CONFLICT)  # it has been run, and another since


async def test_another_request_of_the_same_step_is_refused(model):
    """Whoever can seal two has the client's key: then neither may be what the other computes on."""
    async with begun(model) as (door, session, _, _):
        session._next_step = 0
        await refused(door, session.seal(0, model.rows(5, seed=2), 1), DoorFault.CONFLICT)


async def test_steps_in_another_order_are_refused(model):
    async with begun(model) as (door, session, first, _):
        second, third = (session.seal(at, model.rows(1), 1) for at in (5, 6))
        await refused(door, third, DoorFault.UNKNOWN_SESSION)
        await door.infer(second)
        await door.infer(third)
        for old in (first, second):
            await refused(door, old, DoorFault.CONFLICT)


async def test_a_step_may_take_back_and_go_on_from_there(model):
    async with begun(model) as (door, session, _, _):
        assert session.open(await door.infer(session.seal(3, (), 0))).shape == (0, 64)
        more = model.rows(2, seed=4)
        rows = session.open(await door.infer(session.seal(2, more, 1)))
        expected = reference(model, (0, model.rows(5)), (2, more))[-1:]
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
        error = await refused(door, session.seal(9, more, 1), DoorFault.INVALID)
        assert "holds 4 tokens" in str(error)


async def test_two_clients_with_the_secret_do_not_mix_and_the_first_hears_of_it(model):
    async with begun(model) as (door, first, request, _):
        second = await model.session(door)
        await door.infer(second.seal(0, model.rows(3, seed=7), 1))
        error = await refused(door, first.seal(5, model.rows(1), 1), DoorFault.CONFLICT)
        assert "begun anew elsewhere" in str(error)
        await refused(door, request, DoorFault.CONFLICT)  # nor does its beginning take it back
        more = model.rows(1, seed=8)
        rows = second.open(await door.infer(second.seal(3, more, 1)))
        expected = reference(model, (0, model.rows(3, seed=7)), (3, more))
        np.testing.assert_allclose(rows, expected[-1:], rtol=1e-4, atol=1e-5)


async def test_a_client_without_the_secret_gets_nothing_of_a_session(model):
    async with begun(model) as (door, session, _, _):
        other = await model.session(door, secret=b"x" * 32)
        # Attack: whoever sees a session's id, as every host between does, begins it anew.
        other._name = replace(other._name, session_id=session._name.session_id)
        other.restart()
        for position in (0, 5):
            await refused(door, other.seal(position, model.rows(1), 1), DoorFault.CONFLICT)
        await goes_on(model, door, session)


async def test_all_slots_taken_is_one_clear_error_until_one_is_idle(model, clock):
    async with model.door(num_sessions=2, idle_seconds=60.0, clock=clock) as door:
        sessions = [await model.session(door, name) for name in "abc"]
        for session in sessions[:2]:
            await door.infer(session.seal(0, model.rows(4), 0))
        request = sessions[2].seal(0, model.rows(4), 0)
        await refused(door, request, DoorFault.BUSY)
        clock.now += 59
        await door.infer(sessions[1].seal(4, model.rows(1), 0))
        await refused(door, request, DoorFault.BUSY)
        clock.now += 2
        await door.infer(request)
        await refused(door, sessions[0].seal(4, model.rows(1), 0), DoorFault.UNKNOWN_SESSION)


async def test_what_is_not_authentic_keeps_no_session_alive(model, clock):
    async with begun(model, idle_seconds=60.0, clock=clock) as (door, session, _, _):
        request = session.seal(5, model.rows(1), 1)
        forged = replace(request, cloaked_embedding=bytes(len(request.cloaked_embedding)))
        for _ in range(3):
            clock.now += 40
            await refused(door, forged, DoorFault.UNAUTHENTIC)
        door._sessions.expire()
        await refused(door, request, DoorFault.UNKNOWN_SESSION)


async def test_an_idle_session_is_zeroed_without_anybody_asking(model, autojump_clock):
    async with model.door(idle_seconds=60.0) as door:
        session = await model.session(door)
        await door.infer(session.seal(0, model.rows(5), 1))
        assert any(np.asarray(keys).any() for keys in door._cache.keys)
        await trio.sleep(120)
        assert not any(np.asarray(keys).any() for keys in door._cache.keys)
        await refused(door, session.seal(5, model.rows(1), 1), DoorFault.UNKNOWN_SESSION)


async def test_a_session_that_ends_leaves_its_slot_and_nothing_in_it(model):
    async with begun(model, num_sessions=1) as (door, session, _, _):
        session.open(await door.infer(session.seal(0, (), 0)))
        assert not any(np.asarray(each).any() for each in (*door._cache.keys, *door._cache.values))
        other = await model.session(door, "other")
        await door.infer(other.seal(0, model.rows(1), 1))
        await refused(door, session.seal(0, (), 0), DoorFault.UNKNOWN_SESSION)


async def test_a_worker_that_restarts_knows_no_session_and_shows_its_own_key(model):
    async with begun(model) as (_, session, _, _), model.door() as other:
        request = session.seal(5, model.rows(1), 1)
        error = await refused(other, request, DoorFault.WRONG_KEY)
        again = session.reseal(model.policy.corrected(request, error.key))
        assert again.cloaked_embedding == request.cloaked_embedding
        await refused(other, again, DoorFault.UNKNOWN_SESSION)
        # Attack: evidence of another request's, whose key its door may have lost since.
        with pytest.raises(SessionError, match="refused: user_data"):
            model.policy.corrected(again, error.key)


async def test_a_client_of_another_core_seals_nothing(model):
    async with model.door() as door:
        policy = DoorPolicy(bytes(32), model.policy.verifiers)
        question = policy.ask()
        with pytest.raises(SessionError, match="another manifest"):
            policy.answered(question, await door.attest(question))


async def test_keys_change_in_the_middle_of_a_session(model, clock):
    async with begun(model, clock=clock, idle_seconds=1e9) as (door, session, _, _):
        clock.now += LIFETIME_SECONDS + GRACE_SECONDS
        request = session.seal(5, model.rows(2, seed=9), 2)
        error = await refused(door, request, DoorFault.WRONG_KEY)
        session.open(await door.infer(session.reseal(model.policy.corrected(request, error.key))))


async def test_a_nonce_for_evidence_has_its_length(model):
    async with model.door() as door:
        with pytest.raises(DoorError) as caught:
            await door.attest(AttestRequest(b"short"))
        assert caught.value.fault is DoorFault.INVALID


@pytest.mark.parametrize("wire", ["F16", "I8"])
async def test_rows_that_no_codec_writes_are_refused_and_harm_nobody(tiny_model, wire):
    model = Model(tiny_model, wire)
    async with begun(model) as (door, session, _, _):
        other = await model.session(door, "other")
        bad = [replace(each, data=memoryview(b"\xff" * len(each.data))) for each in model.rows(2)]
        await refused(door, other.seal(0, bad, 1), DoorFault.INVALID)
        await goes_on(model, door, session)


async def test_sessions_that_come_together_are_computed_together_and_do_not_mix(model):
    async with model.door(num_sessions=8) as door:
        sessions = [await model.session(door, str(index)) for index in range(8)]
        steps = door._batcher.core.step
        sizes = []

        def step(header, tensors):
            sizes.append(len(header.segments))
            return steps(header, tensors)

        door._batcher.core.step = step
        found = [[] for _ in sessions]

        async def talk(index):
            session = sessions[index]
            for at in range(6):
                request = session.seal(at, model.rows(1, seed=10 * index + at), 1)
                found[index].append(session.open(await door.infer(request)).copy())

        async with trio.open_nursery() as nursery:
            for index in range(8):
                nursery.start_soon(talk, index)
        assert max(sizes) == 8
        for index, rows in enumerate(found):
            sent = [(at, model.rows(1, seed=10 * index + at)) for at in range(6)]
            for at in range(6):
                expected = reference(model, *sent[: at + 1])
                np.testing.assert_allclose(rows[at], expected[-1:], rtol=1e-4, atol=1e-5)


async def test_the_same_request_twice_at_once_is_computed_once(model):
    async with model.door() as door:
        session = await model.session(door)
        request = session.seal(0, model.rows(3), 1)
        answers = []

        async def ask():
            answers.append(await door.infer(request))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert answers == [answers[0]] * 5
        await goes_on_from(model, door, session, 3)


async def goes_on_from(model, door, session, held):
    more = model.rows(2, seed=9)
    rows = session.open(await door.infer(session.seal(held, more, 2)))
    expected = reference(model, (0, model.rows(held)), (held, more))
    np.testing.assert_allclose(rows, expected[-2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ticks", range(6))
async def test_a_client_that_leaves_finds_its_step_undone_or_done(model, ticks):
    async with begun(model) as (door, session, _, _):
        request = session.seal(5, model.rows(2, seed=9), 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(door.infer, request))
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        rows = session.open(await door.infer(request))
        expected = reference(model, (0, model.rows(5)), (5, model.rows(2, seed=9)))
        np.testing.assert_allclose(rows, expected[-2:], rtol=1e-4, atol=1e-5)
        assert not door._sessions._turns


async def test_a_step_that_cannot_be_computed_costs_the_door_nothing(model, monkeypatch):
    async with begun(model) as (door, session, _, _):
        request = session.seal(5, model.rows(2, seed=9), 2)
        with monkeypatch.context() as patch:
            patch.setattr(door._batcher.core, "step", lambda *_: 1 / 0)
            error = await refused(door, request, DoorFault.UNAVAILABLE)
        assert "zero" not in str(error)
        session.open(await door.infer(request))


def test_shards_that_no_door_can_serve_are_refused(model, tiny_model):
    part = load_shard(tiny_model, model.config, 0, 2, ends=NO_ENDS, expected_hashes=None)
    stages = plan(tiny_model, PlanOptions(1))
    for changes, match in (
        ({"shard": part}, "all 4 layers, and this shard has 0 to 2"),
        ({"shard": model.whole()}, "embedding and head are the client's"),
        ({"manifest": stages}, "embedding and head are the client's"),
        ({"max_seq_len": 5000}, "the model has 4096"),
        ({"num_sessions": 0}, "a door of 0 sessions"),
    ):
        with pytest.raises(InputError, match=match):
            model.setup(**changes)


async def test_sessions_that_no_memory_is_there_for_are_one_clear_error(model, monkeypatch):
    def new_cache(*_):
        raise MemoryError

    monkeypatch.setattr(model.shard, "new_cache", new_cache)
    with pytest.raises(InputError, match="no memory for 2 sessions of 128 positions"):
        async with model.door():
            pass
