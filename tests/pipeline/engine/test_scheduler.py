import random
import time

import pytest

from pipeline.engine.request import FinishReason, Request
from pipeline.engine.scheduler import Limits, Scheduler
from pipeline.errors import MessageError, PromptError
from pipeline.protocol.asked import NOTHING_ASKED
from pipeline.protocol.messages import Abort, Done, Start
from pipeline.protocol.step_header import StepKind
from pipeline.protocol.wants import Want
from pipeline.sampling.draw import Draw
from pipeline.sampling.params import SamplingParams


def run(scheduler, token_of, order=None):
    """Drive a scheduler to its end against a model that is a function of what a slot has seen."""
    slots, events, in_flight, certain = {}, [], [], None
    while scheduler.has_work:
        while (step := scheduler.next_step()) is not None:
            in_flight.append(step)
            assert certain in {None, (step.header, step.token_ids)}
            certain = None
        assert certain is None
        follow_up = scheduler.follow_up()
        step = in_flight.pop(0)
        header, token_ids, offset = step.header, [], 0
        for segment, want in zip(header.segments, header.wants, strict=True):
            seen = slots.setdefault(segment.slot, [])
            if header.kind is StepKind.TRUNCATE:
                del seen[segment.position :]
                continue
            assert segment.position == len(seen), "a slot's tokens must arrive in order"
            seen += step.token_ids[offset : offset + segment.num_tokens]
            offset += segment.num_tokens
            if want is Want.TOKEN:
                token_ids.append(token_of(seen))
        assert header.num_tokens == len(step.token_ids) <= scheduler.limits.max_step_tokens
        if follow_up is not None:
            assert follow_up.due == header
            if follow_up.ends.isdisjoint(token_ids):
                certain = (follow_up.header, tuple(token_ids))
        events += scheduler.complete(header, token_ids)
    assert all(not seen for seen in slots.values()), "every slot ends cleared"
    return events


def solo(request, token_of, max_seq_len=10_000):
    scheduler = Scheduler(Limits(1, max_seq_len))
    scheduler.submit(request)
    return [event.token_id for event in run(scheduler, token_of)]


def checksum(seen):
    return (sum(seen) * 31 + len(seen)) % 1000


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 7, 100])
def test_chunking_changes_nothing_but_the_number_of_steps(chunk_tokens):
    request = Request(1, tuple(range(10)), 5)
    scheduler = Scheduler(Limits(1, 100, chunk_tokens))
    scheduler.submit(request)
    tokens = [event.token_id for event in run(scheduler, checksum)]
    assert tokens == solo(request, checksum)
    assert len(tokens) == 5


def test_a_long_prompts_chunks_are_under_way_together():
    scheduler = Scheduler(Limits(1, 100, chunk_tokens=4, num_stages=3))
    scheduler.submit(Request(1, tuple(range(20)), 1))
    steps = [scheduler.next_step() for _ in range(4)]
    assert [step and step.header.num_tokens for step in steps] == [4, 4, 4, None]


def test_a_request_ends_at_eos_and_reports_it():
    scheduler = Scheduler(Limits(1, 100))
    scheduler.submit(Request(1, (1, 2), 50, frozenset({7})))
    events = run(scheduler, lambda seen: 7 if len(seen) == 4 else 3)
    assert [event.token_id for event in events] == [3, 3, 7]
    assert [event.finish for event in events] == [None, None, FinishReason.EOS]


def test_a_request_ends_where_the_context_does():
    scheduler = Scheduler(Limits(1, 8))
    scheduler.submit(Request(1, (1, 2, 3, 4, 5), 50))
    events = run(scheduler, checksum)
    # Positions 0..7 hold the prompt and three tokens; a fourth needs no position of its own.
    assert len(events) == 4
    assert events[-1].finish is FinishReason.CONTEXT


@pytest.mark.parametrize("length", [0, 8, 9])
def test_a_prompt_that_cannot_fit_is_refused_at_once(length):
    scheduler = Scheduler(Limits(1, 8))
    with pytest.raises(PromptError):
        scheduler.submit(Request(1, tuple(range(length)), 1))
    assert not scheduler.has_work


def test_requests_do_not_see_each_other_whatever_the_slots_and_chunks():
    rng = random.Random(7)
    for _ in range(50):
        limits = Limits(rng.randint(1, 4), 64, rng.randint(1, 16), rng.randint(1, 4))
        scheduler = Scheduler(limits)
        requests = [
            Request(
                i,
                tuple(rng.randrange(100) for _ in range(rng.randint(1, 40))),
                rng.randint(1, 12),
                frozenset({rng.randrange(1000)}),
            )
            for i in range(rng.randint(1, 9))
        ]
        for request in requests:
            scheduler.submit(request)
        events = run(scheduler, checksum)
        for request in requests:
            mine = [e.token_id for e in events if e.request_id == request.request_id]
            assert mine == solo(request, checksum, 64)


def test_an_answer_that_is_not_due_is_refused():
    scheduler = Scheduler(Limits(1, 100))
    scheduler.submit(Request(1, (1,), 2))
    step = scheduler.next_step()
    with pytest.raises(MessageError, match="expected 1"):
        scheduler.complete(step.header, [])
    scheduler.complete(step.header, [5])
    with pytest.raises(MessageError, match="not due"):
        scheduler.complete(step.header, [5])


def test_a_slot_is_reused_only_after_its_clear_has_come_back():
    scheduler = Scheduler(Limits(1, 100))
    scheduler.submit(Request(1, (1,), 1))
    scheduler.submit(Request(2, (2,), 1))
    first = scheduler.next_step()
    scheduler.complete(first.header, [5])
    clear = scheduler.next_step()
    assert clear.header.kind is StepKind.TRUNCATE
    assert scheduler.next_step() is None
    scheduler.complete(clear.header, [])
    assert scheduler.next_step().owners == (2,)


def test_a_cancelled_requests_slot_is_cleared_by_the_next_step_and_its_tokens_are_dropped():
    scheduler = Scheduler(Limits(2, 100))
    scheduler.submit(Request(1, (1,), 50))
    scheduler.submit(Request(2, (2,), 2))
    step = scheduler.next_step()
    scheduler.cancel(1)
    clear = scheduler.next_step()
    assert [segment.slot for segment in clear.header.segments] == [step.header.segments[0].slot]
    events = scheduler.complete(step.header, [7, 8])
    assert [(event.request_id, event.token_id) for event in events] == [(2, 8)]
    scheduler.complete(clear.header, [])
    last = scheduler.next_step()
    assert [segment.slot for segment in last.header.segments] == [step.header.segments[1].slot]


def test_cancelling_what_waits_or_is_gone_changes_nothing_else():
    scheduler = Scheduler(Limits(1, 100))
    scheduler.submit(Request(1, (1,), 1))
    scheduler.submit(Request(2, (2,), 1))
    scheduler.cancel(2)
    scheduler.cancel(9)
    assert [event.request_id for event in run(scheduler, checksum)] == [1]


def test_leaving_and_being_served_cost_the_same_however_many_wait():
    scheduler = Scheduler(Limits(1, 100))
    num_waiting = 20_000
    for i in range(num_waiting):
        scheduler.submit(Request(i, (1,), 1))
    started = time.process_time()
    for i in range(num_waiting // 2):
        scheduler.cancel(i)
        scheduler.cancel(num_waiting - 1 - i) if i % 2 else scheduler.next_step()
    assert time.process_time() - started < 1
    assert scheduler.num_waiting == num_waiting // 4


def test_a_request_says_what_its_tokens_take_and_how_they_are_drawn():
    numbers = iter([0.25, 0.5])
    drawn = Request(
        3, (1, 2), 9, want=Want.DRAWN, next_draw=lambda: Draw(SamplingParams(), (next(numbers),))
    )
    scheduler = Scheduler(Limits(3, 100, chunk_tokens=2))
    scheduler.submit(drawn)
    step = scheduler.next_step()  # with all of its prompt: a token comes of this one
    assert step.header.wants == (Want.DRAWN,)
    assert [how.uniforms for how in step.asked.draws] == [(0.25,)]
    assert scheduler.follow_up() is None  # of what is drawn, more has to be said
    scheduler.complete(step.header, [5])
    assert [how.uniforms for how in scheduler.next_step().asked.draws] == [(0.5,)]


def test_a_chunk_that_ends_inside_a_prompt_draws_nothing():
    request = Request(1, (1, 2, 3), 9, want=Want.DRAWN, next_draw=lambda: Draw(SamplingParams()))
    scheduler = Scheduler(Limits(1, 100, chunk_tokens=2, num_stages=2))
    scheduler.submit(request)
    step = scheduler.next_step()
    assert (step.header.wants, step.asked) == ((Want.NOTHING,), NOTHING_ASKED)
    assert len(scheduler.next_step().asked.draws) == 1


def test_a_request_that_samples_asks_for_logits():
    scheduler = Scheduler(Limits(2, 100))
    scheduler.submit(Request(1, (1,), 1, want=Want.LOGITS))
    scheduler.submit(Request(2, (2,), 1))
    assert scheduler.next_step().header.wants == (Want.LOGITS, Want.TOKEN)


class Stage:
    """What a stage's slots have seen; stands for its KV state."""

    def __init__(self):
        self.slots = {}

    def take(self, step):
        """The tokens a last stage would return."""
        results, offset = [], 0
        for segment, want in zip(step.header.segments, step.header.wants, strict=True):
            seen = self.slots.setdefault(segment.slot, [])
            if step.header.kind is StepKind.TRUNCATE:
                del seen[segment.position :]
                continue
            assert segment.position == len(seen), "a slot's tokens must arrive in order"
            seen += step.token_ids[offset : offset + segment.num_tokens]
            offset += segment.num_tokens
            if want is Want.TOKEN:
                results.append(checksum(seen))
        assert step.header.num_tokens == len(step.token_ids)
        return results

    def rewind(self, lengths):
        for slot, length in enumerate(lengths):
            seen = self.slots.setdefault(slot, [])
            assert len(seen) >= length, "what is certain has been seen"
            del seen[length:]


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
    scheduler = Scheduler(Limits(8, 100, num_stages=num_stages), given_up.append)
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
    scheduler = Scheduler(Limits(1, 1000, chunk_tokens=8), given_up.append)
    scheduler.submit(Request(0, tuple(range(80)), 10))
    while scheduler.has_work:
        for _ in range(3):
            scheduler.next_step()
            scheduler.rewind()
        if (step := scheduler.next_step()) is not None:
            scheduler.complete(step.header, [0] * len(step.owners))
    assert not given_up


def test_a_lone_requests_next_step_is_certain_but_for_its_token():
    scheduler = Scheduler(Limits(2, 100, chunk_tokens=4, num_stages=2))
    scheduler.submit(Request(1, tuple(range(6)), 4, eos_token_ids=frozenset({9})))
    assert scheduler.follow_up() is None  # nothing is under way
    chunks = [scheduler.next_step(), scheduler.next_step()]
    assert scheduler.follow_up() is None  # the first brings no token
    assert scheduler.complete(chunks[0].header, []) == []
    for token_id in (5, 6, 7):
        follow_up = scheduler.follow_up()
        assert follow_up.ends == {9}
        scheduler.complete(follow_up.due, [token_id])
        step = scheduler.next_step()
        assert (step.header, step.token_ids) == (follow_up.header, (token_id,))
    assert scheduler.follow_up() is None  # the next token is the last


@pytest.mark.parametrize("other", ["waits", "runs", "cancelled", "samples"])
def test_nothing_is_certain_of_a_request_that_is_not_alone(other):
    scheduler = Scheduler(Limits(1 if other == "waits" else 2, 100))
    scheduler.submit(Request(1, (1, 2), 9, want=Want.LOGITS if other == "samples" else Want.TOKEN))
    if other in {"runs", "waits"}:
        scheduler.submit(Request(2, (1, 2), 9))
    assert scheduler.next_step() is not None
    if other == "cancelled":
        scheduler.cancel(1)
    assert scheduler.follow_up() is None


@pytest.mark.parametrize("is_cancelled", [False, True])
@pytest.mark.parametrize("has_company", [False, True])
@pytest.mark.parametrize("moment", ["before the token", "after it"])
def test_a_follow_up_is_the_next_step_whoever_comes_or_leaves(is_cancelled, has_company, moment):
    scheduler = Scheduler(Limits(2, 100, num_stages=2))
    scheduler.submit(Request(1, (1, 2), 9))
    due = scheduler.next_step()
    follow_up = scheduler.follow_up()

    def disturb():
        if is_cancelled:
            scheduler.cancel(1)
        if has_company:
            scheduler.submit(Request(2, (7,), 1))

    if moment == "before the token":
        disturb()
        assert scheduler.next_step() is None  # nothing may go before it
        assert scheduler.follow_up() == follow_up
    scheduler.complete(due.header, [5])
    if moment == "after it":
        disturb()
    step = scheduler.next_step()
    assert (step.header, step.token_ids) == (follow_up.header, (5,))
    events, steps = [], [step]
    while scheduler.has_work:
        while (step := scheduler.next_step()) is not None:
            steps.append(step)
        step = steps.pop(0)
        events += scheduler.complete(step.header, [6] * len(step.owners))
    heard = {event.request_id for event in events}
    assert heard == ({1} - ({1} if is_cancelled else set())) | ({2} if has_company else set())


def test_a_follow_up_is_void_after_an_end_and_after_a_loss():
    scheduler = Scheduler(Limits(2, 100))
    scheduler.submit(Request(1, (1, 2), 9, frozenset({4})))
    due = scheduler.next_step()
    scheduler.follow_up()
    scheduler.submit(Request(2, (7, 8), 9))
    scheduler.complete(due.header, [4])
    assert scheduler.next_step().header.kind is StepKind.TRUNCATE
    scheduler.rewind()
    due = scheduler.next_step()
    assert scheduler.follow_up() is not None
    assert scheduler.rewind() == [0, 0]
    again = scheduler.next_step()
    assert (again.header.segments, again.token_ids) == (due.header.segments, due.token_ids)


class Told:
    """What stages know of requests' lives."""

    def __init__(self):
        self.slots = {}
        self.ended = {}

    def hear(self, notices):
        for notice in notices:
            if isinstance(notice, Start):
                assert notice.request_id not in self.ended
                assert notice.slot not in self.slots.values()
                self.slots[notice.request_id] = notice.slot
            else:
                del self.slots[notice.request_id]
                self.ended[notice.request_id] = type(notice)


@pytest.mark.parametrize("seed", range(20))
def test_stages_hear_of_every_request_that_had_a_slot_once_and_in_order(seed):
    rng, given_up, steps, told = random.Random(seed), [], [], Told()
    scheduler = Scheduler(Limits(rng.randint(1, 3), 64, num_stages=2), given_up.append)
    for index in range(120):
        if rng.random() < 0.3:
            scheduler.submit(Request(index, (1, 2, 3), rng.randint(1, 4)))
        if rng.random() < 0.1:
            scheduler.cancel(rng.randrange(80))
        if rng.random() < 0.1:
            scheduler.rewind()
            steps.clear()
        while (step := scheduler.next_step()) is not None:
            steps.append(step)
            told.hear(scheduler.take_notices())
            assert set(step.owners) <= told.slots.keys() | told.ended.keys()
        if steps:
            step = steps.pop(0)
            for event in scheduler.complete(step.header, [9] * len(step.owners)):
                assert event.request_id in told.slots
    told.hear(scheduler.take_notices())
    assert {told.ended[each] for each in given_up} <= {Abort}
    assert Done in told.ended.values()
    assert scheduler.num_running == len(told.slots)


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
            assert (state.slot in scheduler._taken_back) or not is_new
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
    assert scheduler._free_slots == []


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
