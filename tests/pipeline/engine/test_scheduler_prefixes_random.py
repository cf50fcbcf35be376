"""Whatever comes, goes and is lost, every text is that of a cold run."""

import random
from itertools import pairwise

import pytest

from pipeline.engine.idle_prefixes import PrefixOptions, common_length
from pipeline.engine.limits import Limits
from pipeline.engine.request import Request
from pipeline.protocol.step_header import StepKind
from tests.pipeline.engine.prefix_rig import A, B, Clock, Driver, new_scheduler
from tests.pipeline.engine.toy_stages import checksum, solo


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
