"""After a loss the scheduler goes back to what is certain, and gives up who causes it."""

import random

import pytest

from pipeline.engine.limits import Limits
from pipeline.engine.request import Request
from pipeline.engine.scheduler import Scheduler
from pipeline.protocol.step_header import StepKind
from tests.pipeline.engine.toy_stages import Stage, checksum, solo


def random_requests(rng):
    return [
        Request(
            i,
            tuple(rng.randrange(100) for _ in range(rng.randint(1, 40))),
            rng.randint(1, 12),
            frozenset({rng.randrange(1000)}),
        )
        for i in range(rng.randint(1, 9))
    ]


@pytest.mark.parametrize("seed", range(150))
def test_after_any_losses_every_request_goes_on_as_if_nothing_had_happened(seed):
    """Stages take steps at different times; either one, or both, or a link alone may be lost."""
    rng = random.Random(seed)
    limits = Limits(rng.randint(1, 4), 64, rng.randint(1, 16), rng.randint(1, 4))
    scheduler, requests = Scheduler(limits), random_requests(rng)
    for request in requests:
        scheduler.submit(request)
    cancelled = {rng.randrange(len(requests))} if rng.random() < 0.3 else set()
    first, last, events = disturb(rng, scheduler, cancelled)
    for request in requests:
        mine = [event.token_id for event in events if event.request_id == request.request_id]
        expected = solo(request, checksum, 64)
        assert mine == (expected[: len(mine)] if request.request_id in cancelled else expected)
    assert not any(first.slots.values())
    assert not any(last.slots.values())


def lose(rng, scheduler, stages):
    lengths = scheduler.rewind()
    for stage in stages:
        if rng.random() < 0.5:
            stage.slots = {}
            for step in scheduler.replay(0):
                assert step.header.kind is StepKind.REPLAY
                assert not stage.take(step)
            held = {slot: len(seen) for slot, seen in stage.slots.items()}
            assert [held.get(slot, 0) for slot in range(len(lengths))] == lengths
        stage.rewind(lengths)


def disturb(rng, scheduler, cancelled):
    """Run to the end with losses; the stages and all events."""
    first, last = Stage(), Stage()
    events, to_first, to_last, sent = [], [], [], 0
    while scheduler.has_work:
        action = rng.random()
        if action < 0.1:
            lose(rng, scheduler, (first, last))
            to_first, to_last = [], []
        elif action < 0.5 and (step := scheduler.next_step()) is not None:
            to_first.append(step)
            sent += 1
        elif action < 0.75 and to_first:
            step = to_first.pop(0)
            first.take(step)
            to_last.append(step)
        elif to_last:
            step = to_last.pop(0)
            events += scheduler.complete(step.header, last.take(step))
        if sent == 5:
            for request_id in cancelled:
                scheduler.cancel(request_id)
    return first, last, events


def test_a_replay_keeps_the_old_steps_order_and_grouping():
    scheduler = Scheduler(Limits(2, 100, chunk_tokens=4, num_stages=1))
    for index in range(2):
        scheduler.submit(Request(index, tuple(range(3 + index)), 50))
    stage, done = Stage(), []
    for _ in range(6):
        step = scheduler.next_step()
        done.append(step)
        scheduler.complete(step.header, stage.take(step))
    uncertain = scheduler.next_step()
    assert scheduler.rewind() == [len(stage.slots[slot]) for slot in range(2)]
    replayed = list(scheduler.replay(2))
    assert [step.header.step for step in replayed] == [step.header.step for step in done]
    assert [step.header.segments for step in replayed] == [step.header.segments for step in done]
    assert {step.header.until for step in replayed} == {2}
    assert not any(want for step in replayed for want in step.header.wants)
    assert scheduler.next_step().token_ids == uncertain.token_ids


def test_rewinding_twice_is_rewinding_once():
    scheduler = Scheduler(Limits(2, 100, chunk_tokens=8))
    scheduler.submit(Request(1, tuple(range(20)), 3))
    stage = Stage()
    step = scheduler.next_step()
    scheduler.next_step()
    scheduler.complete(step.header, stage.take(step))
    assert scheduler.rewind() == scheduler.rewind()


def lose_whenever_due(scheduler, poisoned, limit=1000):
    """Complete steps, but rewind before any that holds a poisoned request's token; the losses."""
    losses = []
    for _ in range(limit):
        if not scheduler.has_work:
            return losses
        under_way = []
        while (step := scheduler.next_step()) is not None:
            under_way.append(step)
        for step in under_way:
            if poisoned & set(step.owners):
                losses.append([owner for each in under_way for owner in each.owners])
                scheduler.rewind()
                break
            scheduler.complete(step.header, [0] * len(step.owners))
    raise AssertionError("it goes on for ever")


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("poisoned", [{5}, {0, 7}])
def test_only_the_requests_that_are_lost_every_time_are_given_up(num_stages, poisoned):
    given_up = []
    scheduler = Scheduler(
        Limits(8, 100, num_stages=num_stages), lambda each, _: given_up.append(each)
    )
    for index in range(12):
        scheduler.submit(Request(index, (1, 2), 5))
    losses = lose_whenever_due(scheduler, poisoned)
    assert set(given_up) == poisoned
    assert scheduler.num_given_up == len(poisoned)
    # Before it is given up, each was alone when it happened, twice.
    for request_id in poisoned:
        assert losses.count([request_id]) == 2
    assert len(losses) <= 4 * len(poisoned)


def test_nobody_is_given_up_where_nobody_hears_of_it():
    scheduler = Scheduler(Limits(1, 100))
    scheduler.submit(Request(0, (1, 2), 5))
    with pytest.raises(AssertionError, match="for ever"):
        lose_whenever_due(scheduler, {0}, limit=50)
    assert scheduler.num_running == 1


def test_losses_between_which_a_request_moves_are_not_its_fault():
    given_up = []
    scheduler = Scheduler(Limits(1, 1000, chunk_tokens=8), lambda each, _: given_up.append(each))
    scheduler.submit(Request(0, tuple(range(80)), 10))
    while scheduler.has_work:
        for _ in range(3):
            scheduler.next_step()
            scheduler.rewind()
        if (step := scheduler.next_step()) is not None:
            scheduler.complete(step.header, [0] * len(step.owners))
    assert not given_up
