"""The step that is certain to come next, but for its token."""

import numpy as np
import pytest

from pipeline.engine.limits import Limits
from pipeline.engine.request import Request
from pipeline.engine.scheduler import Scheduler
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepKind
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.sampler import Sampler


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


def test_how_the_next_token_is_drawn_is_certain_but_for_the_one_before_it():
    params = SamplingParams(temperature=1.0, seed=1, presence_penalty=1.0)
    sampler = Sampler(params, (1, 2))
    scheduler = Scheduler(Limits(2, 100))
    scheduler.submit(Request(1, (1, 2), 4, want=Want.DRAWN, next_draw=sampler.next_draw))
    step = scheduler.next_step()
    for token_id in (5, 6):
        follow_up = scheduler.follow_up()
        sampler.took(token_id)
        scheduler.complete(step.header, [token_id])
        step = scheduler.next_step()
        (how,), (told,) = step.asked.draws, follow_up.asked(token_id).draws
        assert step.header == follow_up.header
        assert how.uniforms == told.uniforms == sampler.next_draw().uniforms
        assert how.text.tolist() == told.text.tolist() == sampler.next_draw().text.tolist()


class LastToken:
    """A mask that depends on the text: after `n` only tokens from `n` on."""

    def allowed(self, generated, vocab_size):
        return np.arange(vocab_size) >= (generated[-1] if generated else 0)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_mask_of_the_text_is_known_with_the_token_before_it(penalty):
    params = SamplingParams(temperature=1.0, seed=1, presence_penalty=penalty)
    sampler = Sampler(params, (1, 2), masks=(LastToken(),), vocab_size=20, is_foreseeable=False)
    scheduler = Scheduler(Limits(2, 100))
    how = {"next_draw": sampler.next_draw, "draw_behind": sampler.draw_behind}
    scheduler.submit(Request(1, (1, 2), 5, want=Want.DRAWN, **how))
    step = scheduler.next_step()
    for token_id in (5, 6, 9):
        follow_up = scheduler.follow_up()
        (before,) = follow_up.asked(token_id).draws
        sampler.took(token_id)
        (after,) = follow_up.asked(token_id).draws
        scheduler.complete(step.header, [token_id])
        step = scheduler.next_step()
        for told in (before, after, *step.asked.draws):
            assert told.allowed == sampler.next_draw().allowed
            assert len(told.allowed) == len(follow_up.how.allowed)
            assert told.uniforms == follow_up.how.uniforms == sampler.next_draw().uniforms
            assert told.text.tolist() == sampler.next_draw().text.tolist()
        assert step.header == follow_up.header


@pytest.mark.parametrize("other", ["waits", "runs", "cancelled", "samples"])
def test_nothing_is_certain_of_a_request_that_is_not_alone(other):
    scheduler = Scheduler(Limits(1 if other == "waits" else 2, 100))
    want = Want.LOGITS if other == "samples" else Want.TOKEN
    scheduler.submit(Request(1, (1, 2), 9, want=want))
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
