"""Requests go on from what others have left in slots, and nothing but time shows it."""

import random
from itertools import pairwise

import pytest

from pipeline.engine.idle_prefixes import PrefixOptions, common_length
from pipeline.engine.request import Request
from pipeline.engine.scheduler import Limits, Scheduler
from pipeline.protocol.step_header import StepKind
from tests.pipeline.engine.toy_stages import Stage, checksum, solo

KEEPS = PrefixOptions(1.0, 60.0)
A, B = b"a", b"b"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def new_scheduler(limits, options=KEEPS, clock=None, on_give_up=None):
    scheduler = Scheduler(limits, on_give_up, options, clock or Clock())
    scheduler.admission.allow_reuse(is_row_exact=True)
    return scheduler


class Driver:
    """A scheduler before two stages that take steps at different times."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.first, self.last = Stage(), Stage()
        self.to_first, self.to_last, self.steps = [], [], []
        self.events = []

    def finish(self):
        while self.scheduler.has_work:
            assert self.send() or self.answer(), "it hangs"
        return self

    def send(self):
        step = self.scheduler.next_step()
        if step is not None:
            self.steps.append(step)
            self.to_first.append(step)
        return step is not None

    def pass_on(self):
        if self.to_first:
            step = self.to_first.pop(0)
            self.first.take(step)
            self.to_last.append(step)

    def answer(self):
        if not self.to_last:
            self.pass_on()
        if not self.to_last:
            return False
        step = self.to_last.pop(0)
        self.events += self.scheduler.complete(step.header, self.last.take(step))
        return True

    def lose(self, rng):
        lengths = self.scheduler.rewind()
        self.to_first, self.to_last = [], []
        for stage in (self.first, self.last):
            if rng.random() < 0.5:
                stage.slots = {}
                for step in self.scheduler.replay(0):
                    assert step.header.kind is StepKind.REPLAY
                    assert step.header.num_tokens <= self.scheduler.limits.max_step_tokens
                    stage.take(step)
                held = {slot: len(seen) for slot, seen in stage.slots.items()}
                assert [held.get(slot, 0) for slot in range(len(lengths))] == lengths
            stage.rewind(lengths)

    def run(self, *requests):
        """Requests one after another, each to its end; what each of them has heard."""
        heard = []
        for request in requests:
            self.scheduler.submit(request)
            self.finish()
            heard.append(self.tokens(request))
        return heard

    def tokens(self, request):
        mine = [each for each in self.events if each.request_id == request.request_id]
        return [each.token_id for each in mine]

    def cached(self, request):
        return next(e.num_cached for e in self.events if e.request_id == request.request_id)

    def kinds(self):
        return [step.header.kind for step in self.steps]


def chat(request_id, before, more, max_tokens=4, salt=A):
    return Request(request_id, (*before, *more), max_tokens, salt=salt)


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
    driver.scheduler._admit()  # the copy is decided
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


def random_request(rng, index, texts):
    """Some of an earlier text, and something of its own."""
    text = rng.choice(texts)
    begin = text[: rng.randint(0, len(text))]
    more = tuple(rng.randrange(5) for _ in range(rng.randint(1, 20)))
    salt = rng.choice([A, A, B, None])
    return Request(
        index, (*begin, *more)[:50], rng.randint(1, 8), frozenset({rng.randrange(999)}), salt=salt
    )


def check_invariants(scheduler, requests):
    admission = scheduler.admission
    idle = [prefix for prefix, _ in admission.idle._prefixes.values()]
    assert sum(len(prefix.token_ids) for prefix in idle) == admission.idle.num_tokens
    assert admission.idle.num_tokens <= admission.idle.max_tokens
    for prefix in idle:
        assert prefix.salt is not None
        assert sum(piece.num_tokens for piece in prefix.pieces) >= len(prefix.token_ids)
    owned = [state.slot for state in scheduler._running.values()]
    slots = [*owned, *(prefix.slot for prefix in idle), *admission.slots._free]
    assert len(slots) == len(set(slots)) <= scheduler.limits.num_slots
    for state in scheduler._running.values():
        assert state.num_cached < len(state.request.prompt_ids)
        assert sum(piece.num_tokens for piece in state.pieces) == state.num_sent
        assert all(a.end == b.position for a, b in pairwise(state.pieces))
        assert requests[state.request.request_id] is state.request


def disturb(rng, driver, requests, clock, *, loses):
    """Requests that come and go, stages that are lost, time that passes; who was cancelled."""
    scheduler, texts, cancelled = driver.scheduler, [tuple(range(40))], set()

    def come():
        if len(requests) < 25:
            request = random_request(rng, len(requests), texts)
            requests[request.request_id] = request
            texts.append(request.prompt_ids)
            scheduler.submit(request)

    def go():
        if requests:
            cancelled.add(request_id := rng.choice(list(requests)))
            scheduler.cancel(request_id, keeps=rng.random() < 0.5)

    def send():
        if rng.random() < 0.7 or not driver.to_first + driver.to_last:
            driver.send()

    def answer():
        if rng.random() < 0.3:
            scheduler.follow_up()
        driver.answer()

    actions = {
        come: 8, go: 2, scheduler.admission.expire: 2, send: 36, driver.pass_on: 20, answer: 30,
        (lambda: driver.lose(rng)): 2 if loses else 0,
    }  # fmt: skip
    for action in rng.choices(list(actions), actions.values(), k=600):
        clock.now += rng.random() * 0.1
        action()
        check_invariants(scheduler, requests)
    return cancelled


def most_in_common(request, requests, driver):
    """With how many tokens the text of any other request of the same salt begins as this prompt."""
    texts = [
        (*each.prompt_ids, *driver.tokens(each))
        for each in requests.values()
        if each is not request and each.salt == request.salt is not None
    ]
    return max((common_length(text, request.prompt_ids) for text in texts), default=0)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_kept_copied_lost_and_cancelled_every_text_is_that_of_a_cold_run(seed):
    """The stages assert that every position is where a slot ends; the texts say what it held."""
    rng, clock = random.Random(seed), Clock()
    limits = Limits(rng.randint(1, 5), 64, rng.randint(1, 20), rng.randint(1, 3))
    options = PrefixOptions(rng.choice([0.3, 1.0]), rng.choice([5.0, 100.0]))
    driver, requests = Driver(new_scheduler(limits, options, clock)), {}
    cancelled = disturb(rng, driver, requests, clock, loses=rng.random() < 0.6)
    driver.finish()
    for request_id, request in requests.items():
        expected = solo(request, checksum, 64)
        found = driver.tokens(request)
        assert found == (expected[: len(found)] if request_id in cancelled else expected)
        if found:
            assert driver.cached(request) <= most_in_common(request, requests, driver)
    clock.now += 1000
    driver.scheduler.admission.expire()
    driver.finish()
    assert not any(driver.first.slots.values())
    assert not any(driver.last.slots.values())


def test_random_runs_do_reuse():
    """What the property above is about does happen."""
    rng, hits, copies = random.Random(3), 0, 0
    for _ in range(10):
        driver = Driver(new_scheduler(Limits(4, 64, 8, 2)))
        texts = [tuple(range(40))]
        for index in range(15):
            request = random_request(rng, index, texts)
            texts.append(request.prompt_ids)
            driver.scheduler.submit(request)
            driver.send()
        driver.finish()
        hits += driver.scheduler.admission.num_hits
        copies += driver.kinds().count(StepKind.COPY)
    assert hits > 20
    assert copies > 5
