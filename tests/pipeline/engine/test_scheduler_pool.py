"""Requests share a pool of tokens: none is ever exceeded, and nothing but time shows it."""

import random

import pytest

from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.engine.request import FinishReason, Request
from pipeline.engine.scheduler import Scheduler
from pipeline.errors import PromptError
from pipeline.protocol.messages import Abort, Start
from pipeline.protocol.tide_window import TideWindow
from tests.pipeline.engine.prefix_rig import KEEPS, A, B, Clock, Driver, chat
from tests.pipeline.engine.timed_stages import Stages
from tests.pipeline.engine.toy_stages import Stage, checksum, solo


class Pooled(Stage):
    """A stage that cannot hold more than the pool."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens = num_tokens

    def take(self, step):
        found = super().take(step)
        assert sum(map(len, self.slots.values())) <= self.num_tokens
        return found


def driver(num_tokens, limits, options=KEEPS, *, is_exact=True):
    scheduler = Scheduler(limits, None, options, Clock())
    scheduler.admission.allow_reuse(is_row_exact=is_exact)
    assert scheduler.use_pool(num_tokens)
    made = Driver(scheduler)
    made.first, made.last = Pooled(num_tokens), Pooled(num_tokens)
    return made


def test_more_requests_than_fit_all_end_with_the_texts_they_have_alone():
    made = driver(60, Limits(8, 1000, chunk_tokens=16, num_stages=2))
    requests = [Request(i, (i, i + 1, i + 2), 30) for i in range(12)]
    for request in requests:
        made.scheduler.submit(request)
    made.finish()
    assert [made.tokens(each) for each in requests] == [solo(each, checksum) for each in requests]
    assert made.scheduler.roster.num_given_way > 0
    assert made.scheduler.roster.num_held == 0
    assert not any(made.last.slots.values())


def test_the_first_to_come_never_gives_way():
    made = driver(64, Limits(4, 1000, chunk_tokens=16))
    for index in range(4):
        made.scheduler.submit(Request(index, (index,) * 4, 60))
    told = []
    while made.scheduler.has_work:
        assert made.send() or made.answer()
        told += made.scheduler.take_notices()
    gave_way = [each.request_id for each in told if isinstance(each, Abort)]
    assert gave_way
    assert 0 not in gave_way
    # Who gave way begins again before anybody who came later.
    ended = [each.request_id for each in made.events if each.finish is not None]
    assert ended == sorted(ended)
    starts = [each.request_id for each in told if isinstance(each, Start)]
    assert len(starts) == 4 + len(gave_way)


def test_what_has_given_way_is_read_again_in_few_steps_where_rows_are_exact():
    steps = {}
    for is_exact in (True, False):
        made = driver(100, Limits(2, 1000, chunk_tokens=64), is_exact=is_exact)
        requests = [Request(i, (i, 1, 2), 60) for i in range(2)]
        for request in requests:
            made.scheduler.submit(request)
        made.finish()
        assert made.scheduler.roster.num_given_way == 1
        for request in requests:
            assert made.tokens(request) == solo(request, checksum)
        steps[is_exact] = len(made.steps)
    # One by one where they would round otherwise in a step of many.
    assert steps[True] + 20 < steps[False]


def test_a_text_ends_where_the_pool_is_full():
    made = driver(20, Limits(3, 1000))
    made.run(Request(1, (5, 6), 100))
    assert len(made.events) == 19  # of 20 positions the prompt has 2; the last token needs none
    assert made.events[-1].finish is FinishReason.CONTEXT


def test_a_prompt_that_can_never_fit_is_refused_with_the_limit():
    made = driver(20, Limits(3, 1000))
    with pytest.raises(PromptError, match="20 tokens and the context holds 20"):
        made.scheduler.submit(Request(1, (5,) * 20, 1))
    made.scheduler.submit(Request(1, (5,) * 19, 1))


def test_a_prompt_waits_until_it_fits_and_a_shorter_one_behind_it_as_well():
    made = driver(50, Limits(4, 1000, chunk_tokens=64))
    for request in (Request(1, (1,) * 30, 10), Request(2, (2,) * 40, 5), Request(3, (3,), 5)):
        made.scheduler.submit(request)
    made.send()
    assert (made.scheduler.num_running, made.scheduler.num_waiting) == (1, 2)
    made.finish()
    assert [each.request_id for each in made.events if each.finish] == [1, 2, 3]
    assert made.scheduler.roster.num_given_way == 0


def test_kept_prefixes_give_way_before_requests_do():
    made = driver(60, Limits(4, 1000, chunk_tokens=64))
    made.run(chat(1, (1,) * 20, ()), chat(2, (2,) * 20, (), salt=B))
    assert made.scheduler.admission.num_idle == 46
    request = chat(3, (3,) * 30, (), max_tokens=10)
    assert made.run(request) == [solo(request, checksum)]
    assert made.scheduler.roster.num_given_way == 0
    assert len(made.scheduler.admission.idle) <= 2


def test_a_prefix_is_gone_on_from_in_its_slot_where_there_is_no_room_for_a_copy():
    made = driver(64, Limits(4, 1000, chunk_tokens=64))
    made.run(chat(1, range(60), ()))
    second = chat(2, range(20), (99, 98))  # a third of it: else it would be copied
    assert made.run(second) == [solo(second, checksum)]
    assert made.cached(second) == 20


def test_under_a_window_a_request_takes_no_more_than_that():
    window = TideWindow(12, 2)
    made = driver(30, Limits(3, 1 << 20, chunk_tokens=8, window=window))
    requests = [Request(index, (index,) * 3, 50) for index in range(5)]
    for request in requests:
        made.scheduler.submit(request)
    while made.scheduler.has_work:
        assert made.scheduler.roster.num_held <= 30 + made.scheduler.num_running
        step = made.scheduler.next_step()
        if step is None:
            step = made.to_last.pop(0)
            num_results = len(step.owners)
            made.events += made.scheduler.complete(step.header, [1] * num_results)
        else:
            made.to_last.append(step)
    assert len([each for each in made.events if each.finish]) == 5


def random_chats(rng, num_tokens):
    """Texts of which many begin alike; none is longer than the pool."""
    shared = tuple(range(num_tokens // 2))
    for index in range(25):
        before = shared[: rng.randint(0, len(shared))]
        more = [rng.randrange(50) for _ in range(rng.randint(1, num_tokens // 3))]
        yield chat(index, before, more, rng.randint(1, 40), salt=rng.choice([A, B, None]))


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_leaves_and_is_lost_the_pool_holds_and_texts_stay(seed, is_exact):
    rng = random.Random(seed)
    num_tokens = rng.randint(20, 120)
    limits = Limits(
        rng.randint(1, 6), 1000, chunk_tokens=rng.choice([3, 16, 64]), num_stages=rng.randint(1, 3)
    )
    options = rng.choice([KEEPS, PrefixOptions(0.3, 60.0), PrefixOptions(0.0)])
    made = driver(num_tokens, limits, options, is_exact=is_exact)
    requests = list(random_chats(rng, num_tokens))
    waiting, gone = list(requests), set()
    while waiting or made.scheduler.has_work:
        choice = rng.random()
        if waiting and choice < 0.1:
            made.scheduler.submit(waiting.pop(0))
        elif choice < 0.11:
            gone.add(index := rng.randrange(25))
            made.scheduler.cancel(index, keeps=rng.random() < 0.5)
        elif choice < 0.12:
            made.lose(rng)
        elif choice < 0.5:
            made.send()
        elif choice < 0.7:
            made.pass_on()
        elif not made.answer() and not waiting:
            assert made.send() or made.answer() or not made.scheduler.has_work, "it hangs"
    for request in requests:
        if request.request_id not in gone:
            expected = solo(request, checksum, max_seq_len=num_tokens)
            assert made.tokens(request) == expected


def test_after_a_loss_no_more_is_replayed_than_a_smaller_stage_has_room_for():
    made = driver(100, Limits(4, 1000, chunk_tokens=64))
    requests = [Request(index, (index,) * 20, 30) for index in range(4)]
    for request in requests:
        made.scheduler.submit(request)
    for _ in range(30):
        assert made.send() or made.answer()
    made.scheduler.rewind()
    assert not made.scheduler.use_pool(60)
    made.first, made.last = Pooled(60), Pooled(60)
    made.to_first, made.to_last = [], []
    lengths = made.scheduler.rewind()
    assert 0 < sum(lengths) <= 60
    assert made.scheduler.use_pool(60)
    for step in made.scheduler.replay(0):
        made.first.take(step)
        made.last.take(step)
    made.finish()
    assert [made.tokens(each) for each in requests] == [solo(each, checksum) for each in requests]


def test_what_no_longer_fits_at_all_is_given_up_with_the_reason():
    heard = []
    scheduler = Scheduler(Limits(2, 1000), lambda *each: heard.append(each))
    scheduler.use_pool(100)
    scheduler.submit(Request(7, (1,) * 80, 5))
    scheduler.use_pool(50)
    assert scheduler.next_step() is None
    ((request_id, reason),) = heard
    assert request_id == 7
    assert "80 tokens" in reason
    assert "50" in reason


def test_a_crowd_that_gives_way_is_as_fast_as_fewer_that_need_not():
    """Replays cost little beside what more rows in a step gain."""
    speeds, tokens = [(0.043, 0.00285)] * 2, {}
    for num_slots, pool in ((8, None), (16, 1000)):
        stages = Stages(*speeds, overlapping=True, num_slots=num_slots)
        stages.scheduler.admission.allow_reuse(True)
        stages.scheduler.use_pool(pool)
        for index in range(32):
            stages.submit(index, 5, 125)
        stages.run()
        assert {len(times) for times in stages.heard.values()} == {125}
        assert (stages.scheduler.roster.num_given_way > 0) == (pool is not None)
        tokens[pool] = 32 * 125 / stages.now
    assert tokens[1000] >= 0.8 * tokens[None]
