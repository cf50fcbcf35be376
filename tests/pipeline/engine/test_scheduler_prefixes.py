"""Requests go on from what others have left in slots, and nothing but time shows it."""

import pytest

from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.engine.scheduler import Scheduler
from pipeline.protocol.step_header import StepKind
from tests.pipeline.engine.prefix_rig import KEEPS, A, B, Clock, Driver, chat, new_scheduler
from tests.pipeline.engine.toy_stages import checksum, solo


def second_turn(first, heard, more, **fields):
    return chat(2, (*first.prompt_ids, *heard), more, **fields)


def test_a_second_turn_goes_on_in_its_slot_and_only_what_is_new_travels():
    driver = Driver(new_scheduler(Limits(2, 200)))
    first = chat(1, range(50), ())
    (heard,) = driver.run(first)
    begun = len(driver.steps)
    second = second_turn(first, heard, (7, 8, 9))
    assert driver.run(second) == [solo(second, checksum)]
    assert driver.cached(second) == 53  # all but the last token, which was never sent
    assert driver.steps[begun].header.segments[0].position == 53
    assert set(driver.kinds()) == {StepKind.STEP}
    assert driver.scheduler.admission.num_hits == 1
    assert driver.scheduler.admission.num_cached_tokens == 53


def test_the_same_prompt_again_has_its_last_token_computed():
    driver = Driver(new_scheduler(Limits(1, 200)))
    first, again = chat(1, range(50), ()), chat(2, range(50), ())
    heard = driver.run(first, again)
    assert heard[0] == heard[1]
    assert (driver.cached(first), driver.cached(again)) == (0, 49)


@pytest.mark.parametrize(("salt", "cached"), [(B, 0), (None, 0), (A, 49)])
def test_only_a_request_of_the_same_salt_finds_it(salt, cached):
    driver = Driver(new_scheduler(Limits(3, 200)))
    driver.run(chat(1, range(50), ()), chat(2, range(50), (), salt=salt))
    assert driver.cached(chat(2, (), ())) == cached


def test_a_request_without_salt_leaves_nothing():
    driver = Driver(new_scheduler(Limits(2, 200)))
    driver.run(chat(1, range(50), (), salt=None))
    assert not any(driver.last.slots.values())
    assert len(driver.scheduler.admission.idle) == 0


@pytest.mark.parametrize("allowed", [False, None])
def test_nothing_is_kept_where_rows_are_not_exact_or_it_is_not_known(allowed):
    scheduler = Scheduler(Limits(2, 200), None, KEEPS, Clock())
    if allowed is not None:
        scheduler.admission.allow_reuse(allowed)
    driver = Driver(scheduler)
    driver.run(chat(1, range(50), ()), chat(2, range(50), ()))
    assert driver.cached(chat(2, (), ())) == 0
    assert not any(driver.last.slots.values())


def test_what_is_kept_is_dropped_when_rows_are_no_longer_exact():
    driver = Driver(new_scheduler(Limits(2, 200)))
    driver.run(chat(1, range(50), ()))
    driver.scheduler.admission.allow_reuse(is_row_exact=False)
    driver.finish()
    assert not any(driver.last.slots.values())


def test_a_share_of_nothing_keeps_nothing():
    driver = Driver(new_scheduler(Limits(2, 200), PrefixOptions(0.0)))
    driver.run(chat(1, range(50), ()))
    assert not any(driver.last.slots.values())


def test_no_more_is_kept_than_the_share():
    driver = Driver(new_scheduler(Limits(2, 100), PrefixOptions(0.2)))
    driver.run(chat(1, range(60), ()))
    assert sum(map(len, driver.last.slots.values())) == 40
    driver.run(chat(2, range(100, 130), (), max_tokens=1))
    assert sorted(map(len, driver.last.slots.values())) == [0, 30]  # the older one had to go
    driver.run(chat(3, range(100, 140), ()))
    assert driver.cached(chat(3, (), ())) == 30


def test_an_idle_slot_is_taken_when_no_free_one_is_left_the_oldest_first():
    driver = Driver(new_scheduler(Limits(2, 100)))
    driver.run(chat(1, range(30), ()), chat(2, range(100, 130), ()), chat(3, (9,) * 30, ()))
    assert driver.kinds().count(StepKind.TRUNCATE) == 1
    driver.run(chat(4, range(100, 131), ()))
    assert driver.cached(chat(4, (), ())) == 30
    driver.run(chat(5, range(31), ()))
    assert driver.cached(chat(5, (), ())) == 0


def test_a_prefix_expires_and_is_cleared():
    clock = Clock()
    driver = Driver(new_scheduler(Limits(2, 100), KEEPS, clock))
    driver.run(chat(1, range(30), ()))
    assert driver.scheduler.admission.idle.next_expiry == 60.0
    clock.now = 59.9
    driver.scheduler.admission.expire()
    assert not driver.scheduler.has_work
    clock.now = 60.0
    driver.scheduler.admission.expire()
    driver.finish()
    assert not any(driver.last.slots.values())
    driver.run(chat(2, range(30), ()))
    assert driver.cached(chat(2, (), ())) == 0


def test_what_another_request_is_using_is_copied():
    driver = Driver(new_scheduler(Limits(2, 200)))
    first, second = chat(1, range(50), (), 20), chat(2, range(48), (3, 3), 20)
    driver.scheduler.submit(first)
    for _ in range(3):
        driver.send()
        driver.answer()
    driver.scheduler.submit(second)
    driver.finish()
    assert driver.kinds().count(StepKind.COPY) == 1
    assert driver.cached(second) == 48
    assert driver.tokens(first) == solo(first, checksum)
    assert driver.tokens(second) == solo(second, checksum)


def test_the_same_prompts_that_come_together_are_read_once():
    driver = Driver(new_scheduler(Limits(4, 200, chunk_tokens=16, num_stages=2)))
    requests = [chat(i, range(100), (i,)) for i in range(4)]
    for request in requests:
        driver.scheduler.submit(request)
    driver.finish()
    prompt_tokens = sum(
        step.header.num_tokens for step in driver.steps if step.header.kind is StepKind.STEP
    )
    assert prompt_tokens == 101 + 3 * 1 + 4 * 3
    assert [driver.tokens(each) for each in requests] == [solo(r, checksum) for r in requests]
    assert [driver.cached(each) for each in requests] == [0, 100, 100, 100]


def test_whoever_waits_for_a_request_that_leaves_reads_the_prompt_itself():
    driver = Driver(new_scheduler(Limits(2, 200, chunk_tokens=16)))
    first, second = chat(1, range(100), ()), chat(2, range(100), ())
    driver.scheduler.submit(first)
    driver.scheduler.submit(second)
    driver.send()
    driver.scheduler.cancel(1)
    driver.finish()
    assert driver.tokens(second) == solo(second, checksum)


def test_a_long_text_is_not_given_up_for_a_few_tokens_of_it():
    driver = Driver(new_scheduler(Limits(3, 200)))
    driver.run(chat(1, range(100), ()), chat(2, range(30), (9,)))
    assert driver.cached(chat(2, (), ())) == 30
    driver.run(chat(3, range(100), (5,)))
    assert driver.cached(chat(3, (), ())) == 100


@pytest.mark.parametrize("keeps", [False, True])
def test_a_copy_is_made_though_its_source_leaves_before_it_is_sent(keeps):
    driver = Driver(new_scheduler(Limits(2, 200)))
    first, second = chat(1, range(50), (), 20), chat(2, range(48), (3, 3), 20)
    driver.scheduler.submit(first)
    driver.send()
    driver.scheduler.submit(second)
    driver.scheduler.roster.admit()  # the copy is decided
    driver.scheduler.cancel(1, keeps=keeps)
    driver.scheduler.submit(chat(3, (8,) * 20, ()))  # it takes the slot that is left
    driver.finish()
    assert driver.tokens(second) == solo(second, checksum)
    assert driver.cached(second) == 48


@pytest.mark.parametrize("is_promised", [False, True])
def test_what_is_left_under_way_is_kept_as_far_as_it_was_sent(is_promised):
    driver = Driver(new_scheduler(Limits(1, 200)))
    driver.scheduler.submit(chat(1, range(50), (), 20))
    driver.send()
    if is_promised:
        assert driver.scheduler.follow_up() is not None
    driver.scheduler.cancel(1, keeps=True)
    second = chat(2, range(50), (4, 4), 5)
    driver.scheduler.submit(second)
    driver.finish()
    assert driver.tokens(second) == solo(second, checksum)
    assert driver.cached(second) == 50


def test_what_is_cancelled_is_cleared():
    driver = Driver(new_scheduler(Limits(1, 200)))
    driver.scheduler.submit(chat(1, range(50), (), 20))
    driver.send()
    driver.scheduler.cancel(1)
    driver.finish()
    assert not any(driver.last.slots.values())
