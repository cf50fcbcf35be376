"""What a request takes back of its slot is forgotten by the stages and sent again."""

import random

import pytest

from pipeline.engine.limits import Limits
from pipeline.engine.request import Request
from pipeline.engine.scheduler import Scheduler
from pipeline.protocol.step_header import StepKind
from tests.pipeline.engine.toy_stages import Stage, checksum, solo


def take_a_step(scheduler, stage):
    step = scheduler.next_step()
    scheduler.complete(step.header, stage.take(step))
    return step


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_taken_back_is_sent_again_and_the_text_stays_the_same(chunk_tokens, seed):
    rng = random.Random(seed)
    requests = [Request(i, tuple(range(i, i + 6)), 12) for i in range(3)]
    expected = {each.request_id: solo(each, checksum) for each in requests}
    scheduler, stage = Scheduler(Limits(3, 100, chunk_tokens)), Stage()
    for request in requests:
        scheduler.submit(request)
    found = {each.request_id: [] for each in requests}
    num_taken_back = 0
    while scheduler.has_work:
        step = scheduler.next_step()
        for event in scheduler.complete(step.header, stage.take(step)):
            found[event.request_id].append(event.token_id)
        if rng.random() < 0.3 and scheduler._running:
            request_id, state = rng.choice(list(scheduler._running.items()))
            length = rng.randint(0, state.num_sent)
            is_new = length < state.num_sent
            scheduler.take_back(request_id, length)
            orders = scheduler._slots._orders
            assert any(order.slot == state.slot for order in orders) or not is_new
            num_taken_back += is_new
    assert found == expected
    assert num_taken_back
    assert not any(stage.slots.values())


def test_what_is_taken_back_is_forgotten_by_the_very_next_step():
    scheduler, stage = Scheduler(Limits(2, 100)), Stage()
    scheduler.submit(Request(1, (1, 2, 3), 9))
    take_a_step(scheduler, stage)
    scheduler.take_back(1, 2)
    assert scheduler.follow_up() is None
    step = take_a_step(scheduler, stage)
    assert step.header.kind is StepKind.TRUNCATE
    assert [tuple(segment) for segment in step.header.segments] == [(0, 2, 0)]
    assert stage.slots[0] == [1, 2]
    assert scheduler.next_step().header.segments[0].position == 2


def test_a_request_that_ends_after_all_gives_its_slot_back_once():
    scheduler, stage = Scheduler(Limits(1, 100)), Stage()
    scheduler.submit(Request(1, (1, 2, 3), 9))
    scheduler.submit(Request(2, (4,), 1))
    take_a_step(scheduler, stage)
    scheduler.take_back(1, 2)
    back = scheduler.next_step()
    scheduler.cancel(1)
    scheduler.complete(back.header, stage.take(back))
    clear = scheduler.next_step()  # not a step of the one that waits: the slot is not free yet
    assert (clear.header.kind, clear.freed) == (StepKind.TRUNCATE, (0,))
    scheduler.complete(clear.header, stage.take(clear))
    assert scheduler.next_step().owners == (2,)
    assert not scheduler._slots.has_free


def test_a_slot_is_cleared_though_some_of_it_was_to_be_taken_back():
    scheduler, stage = Scheduler(Limits(1, 100)), Stage()
    scheduler.submit(Request(1, (1, 2, 3), 9))
    take_a_step(scheduler, stage)
    scheduler.take_back(1, 2)
    scheduler.cancel(1)
    step = take_a_step(scheduler, stage)
    assert [tuple(segment) for segment in step.header.segments] == [(0, 0, 0)]
    assert not scheduler.has_work


@pytest.mark.parametrize("comes_back", [True, False])
def test_what_was_taken_back_is_not_replayed_after_a_loss(comes_back):
    scheduler, stage = Scheduler(Limits(1, 100)), Stage()
    scheduler.submit(Request(1, (1, 2, 3), 9))
    for _ in range(3):
        take_a_step(scheduler, stage)
    scheduler.take_back(1, 4)
    if comes_back:
        take_a_step(scheduler, stage)
    else:
        scheduler.next_step()
    assert scheduler.rewind() == [4]
    stage.rewind([4])
    fresh = Stage()
    for step in scheduler.replay(1):
        fresh.take(step)
    assert fresh.slots == stage.slots
    assert scheduler.next_step().header.segments[0].position == 4


@pytest.mark.parametrize("length", [-1, 4])
def test_what_has_not_been_sent_cannot_be_taken_back(length):
    scheduler, stage = Scheduler(Limits(1, 100)), Stage()
    scheduler.submit(Request(1, (1, 2, 3), 9))
    take_a_step(scheduler, stage)
    with pytest.raises(ValueError, match="cannot keep"):
        scheduler.take_back(1, length)


def test_nothing_is_taken_back_under_a_step_that_is_on_its_way():
    scheduler = Scheduler(Limits(1, 100))
    scheduler.submit(Request(1, (1, 2, 3), 9))
    scheduler.next_step()
    with pytest.raises(ValueError, match="cannot keep"):
        scheduler.take_back(1, 2)
