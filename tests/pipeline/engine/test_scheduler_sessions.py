"""A slot that is loaded from a session: nothing goes before, and after a loss all is computed."""

from types import SimpleNamespace

import pytest

from pipeline.engine.limits import Limits
from pipeline.engine.request import Request
from pipeline.engine.scheduler import Scheduler
from pipeline.protocol.step_header import StepKind

PROMPT = tuple(range(40))


@pytest.fixture
def scheduler():
    scheduler = Scheduler(Limits(2, 100))
    scheduler.admission.allow_reuse(True)
    return scheduler


def submit(scheduler, request_id=0, stored_ids=PROMPT[:30]):
    stored = SimpleNamespace(stored_ids=stored_ids)
    scheduler.submit(Request(request_id, PROMPT, 3, stored=stored))


def start_loading(scheduler):
    assert scheduler.next_step() is None
    (transfer,) = scheduler.admission.take_transfers()
    assert transfer.is_load
    return transfer


def test_only_what_was_not_loaded_is_computed(scheduler):
    submit(scheduler)
    transfer = start_loading(scheduler)
    assert transfer.length == 30
    scheduler.loaded(transfer, is_done=True)
    step = scheduler.next_step()
    assert step.token_ids == PROMPT[30:]
    assert step.header.segments[0].position == 30


def test_a_load_that_failed_is_cleared_and_all_is_computed(scheduler):
    submit(scheduler)
    scheduler.loaded(start_loading(scheduler), is_done=False)
    clearing, step = scheduler.next_step(), scheduler.next_step()
    assert clearing.header.kind is StepKind.TRUNCATE
    assert step.token_ids == PROMPT


def test_others_go_on_while_one_is_loaded(scheduler):
    submit(scheduler)
    start_loading(scheduler)
    scheduler.submit(Request(1, (5, 6), 3))
    assert scheduler.next_step().token_ids == (5, 6)


def test_the_slot_of_one_that_left_is_cleared_when_its_load_is_over(scheduler):
    submit(scheduler)
    transfer = start_loading(scheduler)
    scheduler.cancel(0)
    assert scheduler.next_step() is None
    assert scheduler.has_work
    scheduler.loaded(transfer, is_done=True)
    step = scheduler.next_step()
    assert step.header.kind is StepKind.TRUNCATE
    assert step.freed == (transfer.state.slot,)
    scheduler.complete(step.header, [])
    assert not scheduler.has_work


@pytest.mark.parametrize("is_loaded", [False, True])
def test_after_a_loss_what_was_loaded_is_computed_anew(scheduler, is_loaded):
    submit(scheduler)
    transfer = start_loading(scheduler)
    if is_loaded:
        scheduler.loaded(transfer, is_done=True)
        step = scheduler.next_step()
        scheduler.complete(step.header, [7])
    assert scheduler.rewind() == [0, 0]
    assert not list(scheduler.replay(1))
    assert scheduler.next_step().token_ids == PROMPT


def test_what_is_copied_from_a_loaded_slot_is_computed_anew_too(scheduler):
    scheduler = Scheduler(Limits(2, 100))
    scheduler.admission.idle.max_tokens = 100
    scheduler.admission.allow_reuse(True)
    stored = SimpleNamespace(stored_ids=PROMPT[:30])
    scheduler.submit(Request(0, PROMPT, 3, salt=b"s", stored=stored))
    scheduler.submit(Request(1, PROMPT, 3, salt=b"s"))
    scheduler.loaded(start_loading(scheduler), is_done=True)
    first = scheduler.next_step()
    scheduler.complete(first.header, [7])
    copy = scheduler.next_step()
    assert copy.header.kind is StepKind.COPY
    scheduler.complete(copy.header, [])
    assert scheduler.rewind() == [0, 0]
    assert not list(scheduler.replay(1))


def test_with_kernels_that_are_not_exact_the_text_alone_is_kept(scheduler):
    scheduler.admission.allow_reuse(False)
    scheduler.submit(Request(0, PROMPT, 1, stored=SimpleNamespace(stored_ids=PROMPT[:30])))
    step = scheduler.next_step()
    assert step.token_ids == PROMPT
    scheduler.complete(step.header, [7])
    (transfer,) = scheduler.admission.take_transfers()
    assert (transfer.is_load, transfer.length) == (False, 0)
    assert transfer.state.known(0, 99) == (*PROMPT, 7)


def test_a_slot_is_not_let_go_of_before_it_is_saved(scheduler):
    scheduler.submit(Request(0, PROMPT, 1, stored=SimpleNamespace(stored_ids=())))
    step = scheduler.next_step()
    scheduler.complete(step.header, [7])
    (transfer,) = scheduler.admission.take_transfers()
    assert (transfer.is_load, transfer.length) == (False, 40)
    assert scheduler.next_step() is None
    assert scheduler.has_work
    scheduler.admission.saved(transfer)
    step = scheduler.next_step()
    assert step.header.kind is StepKind.TRUNCATE
