import random
import time

import pytest

from pipeline.engine.limits import Limits
from pipeline.engine.request import FinishReason, Request
from pipeline.engine.scheduler import Scheduler
from pipeline.errors import MessageError, PromptError
from pipeline.protocol.last_stage_inputs import NOTHING_ASKED
from pipeline.protocol.messages import Abort, Done, Start
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepKind
from pipeline.sampling.draw import Draw
from pipeline.sampling.params import SamplingParams
from tests.pipeline.engine.toy_stages import checksum, run, solo


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
        3, (1, 2), 9, want=Want.DRAWN, next_draw=lambda _: Draw(SamplingParams(), (next(numbers),))
    )
    scheduler = Scheduler(Limits(3, 100, chunk_tokens=2))
    scheduler.submit(drawn)
    step = scheduler.next_step()  # with all of its prompt: a token comes of this one
    assert step.header.wants == (Want.DRAWN,)
    assert [how.uniforms for how in step.asked.draws] == [(0.25,)]
    scheduler.complete(step.header, [5])
    assert [how.uniforms for how in scheduler.next_step().asked.draws] == [(0.5,)]


def test_a_chunk_that_ends_inside_a_prompt_draws_nothing():
    request = Request(1, (1, 2, 3), 9, want=Want.DRAWN, next_draw=lambda _: Draw(SamplingParams()))
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
    scheduler = Scheduler(
        Limits(rng.randint(1, 3), 64, num_stages=2), lambda each, _: given_up.append(each)
    )
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
