"""Requests spread over as many steps as there are stages: none idles, nobody waits in vain."""

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from pipeline.engine.limits import Limits
from pipeline.engine.prefill_chunks import MIN_CHUNK_TOKENS
from pipeline.engine.request import Request
from pipeline.engine.scheduler import MIN_SHARE, Scheduler
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepKind

# A step of n rows takes a stage this long: mostly the time to read its weights, as on real ones.
FIXED, PER_ROW = 10.0, 1.0


def seconds(num_rows):
    return FIXED + PER_ROW * num_rows if num_rows else 0.0


def num_decoding(step):
    """Requests of a step that have read their prompts."""
    return sum(segment.position > 0 for segment in step.header.segments)


@dataclass
class Simulation:
    """Stages that take `seconds` for a step, and what feeds them; time is simulated."""

    scheduler: Scheduler
    now: float = 0.0
    # When each stage has finished all it was given.
    free_at: list[float] = field(default_factory=list)
    under_way: deque = field(default_factory=deque)
    tokens: Counter = field(default_factory=Counter)
    first_at: dict = field(default_factory=dict)
    busy: float = 0.0

    def __post_init__(self):
        self.free_at = [0.0] * self.scheduler.limits.num_stages

    def send(self):
        """All that may be; what that is."""
        sent = []
        while (step := self.scheduler.next_step()) is not None:
            sent.append(step)
            at = self.now
            for stage, free_at in enumerate(self.free_at):
                took = seconds(step.header.num_tokens)
                at = self.free_at[stage] = max(at, free_at) + took
                self.busy += took
            self.under_way.append((at, step))
        return sent

    def advance(self):
        """Until the next result comes back; what happens then."""
        self.send()
        self.now, step = self.under_way.popleft()
        num_results = sum(want is not Want.NOTHING for want in step.header.wants)
        events = self.scheduler.complete(step.header, [1] * num_results)
        for event in events:
            self.tokens[event.request_id] += 1
            self.first_at.setdefault(event.request_id, self.now)
        return events

    def run(self):
        while self.scheduler.has_work:
            self.advance()
        return self.now


def simulation(num_slots, num_stages, chunk_tokens=512):
    return Simulation(Scheduler(Limits(num_slots, 100_000, chunk_tokens, num_stages)))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("num_requests", [1, 2, 5, 16, 31])
def test_decoding_takes_the_time_it_would_if_no_stage_ever_waited(num_stages, num_requests):
    sim, num_tokens = simulation(num_requests, num_stages), 200
    for index in range(num_requests):
        sim.scheduler.submit(Request(index, (1,), num_tokens))
    # A request visits every stage for every token, in the company of its share of the others.
    share = min(num_requests, max(MIN_SHARE, -(-num_requests // num_stages)))
    ideal = num_tokens * num_stages * seconds(share)
    assert sim.run() <= 1.03 * ideal
    assert all(sim.tokens[index] == num_tokens for index in range(num_requests))


def test_a_lone_request_is_never_held_up():
    sim, num_tokens = simulation(16, 3), 100
    sim.scheduler.submit(Request(0, (1,), num_tokens))
    assert sim.run() == num_tokens * 3 * seconds(1)


@pytest.mark.parametrize("seed", range(40))
def test_requests_that_come_and_go_leave_no_stage_idle(seed):
    """Never mind how many have just ended, shares are even again within one round."""
    rng = random.Random(seed)
    num_stages = rng.choice([2, 3, 4])
    num_slots = rng.randint(3 * num_stages, 16)  # shares of two at least, if some are missing
    sim = simulation(num_slots, num_stages)
    waiting = deque(Request(i, (1,), rng.randint(1, 120)) for i in range(100))
    for _ in range(num_slots):
        sim.scheduler.submit(waiting.popleft())
    while sim.scheduler.has_work:
        for event in sim.advance():
            if event.finish is not None and waiting:
                sim.scheduler.submit(waiting.popleft())
        share = max(MIN_SHARE, -(-sim.scheduler.num_running // num_stages))
        assert all(num_decoding(step) <= share for step in sim.send())
        under_way = [step for _, step in sim.under_way if step.header.kind is StepKind.STEP]
        assert len(under_way) <= num_stages
        if waiting:
            # All that could be sent has been: either every share is under way, or all requests.
            owned = sum(len(step.owners) for step in under_way)
            num_running = sim.scheduler.num_running  # some may have joined just now
            num_shares = min(num_stages, -(-num_running // share))
            assert len(under_way) >= num_shares or owned == num_running
    # The last requests cannot fill the stages; before, nearly all of the time is work.
    assert sim.busy > 0.8 * num_stages * sim.now


def test_steps_that_have_become_uneven_are_even_again_after_one_round():
    sim = simulation(12, 2)
    for index in range(12):
        sim.scheduler.submit(Request(index, (1,), 1000))
    for _ in range(20):
        sim.advance()
    sim.send()
    gone = sim.under_way[-1][1].owners[:5]
    for request_id in gone:
        sim.scheduler.cancel(request_id)
    for _ in range(4):  # both old steps, the step that clears, and the first new one
        sim.advance()
    sim.send()
    sizes = [num_decoding(step) for _, step in sim.under_way]
    assert sorted(sizes) == [3, 4]


def test_two_requests_that_came_apart_come_together():
    sim = simulation(2, 2)
    for index in range(2):
        sim.scheduler.submit(Request(index, (1,) * MIN_CHUNK_TOKENS, 100))
    assert [step.owners for step in sim.send()] == [(0,), (1,)]
    sim.advance()
    assert [step.owners for step in sim.send()] == [(0,)]
    sim.advance()
    assert sim.send() == []
    sim.advance()
    assert [step.owners for step in sim.send()] == [(1, 0)]


@pytest.mark.parametrize("seed", range(40))
def test_nobody_starves(seed):
    """Between two tokens of a request, every step takes others at most so often."""
    rng = random.Random(seed)
    num_stages, num_slots = rng.randint(1, 4), rng.randint(2, 12)
    sim = simulation(num_slots, num_stages, chunk_tokens=rng.choice([8, 64, 512]))
    for index in range(40):
        prompt = (1,) * rng.choice([1, 5, 300])
        sim.scheduler.submit(Request(index, prompt, rng.randint(1, 40)))
    taken, last_step = 0, {}
    while sim.scheduler.has_work:
        events = sim.advance()
        taken += 1
        for event in events:
            gap = taken - last_step.get(event.request_id, taken)
            # Every stage's step may be ahead of it, twice as shares change, and slots be cleared.
            assert gap <= 2 * num_stages + num_slots, event
            last_step[event.request_id] = taken
    assert len(sim.first_at) == 40


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("num_clients", [1, 2, 3, 6])
@pytest.mark.parametrize("prompt_length", [4, 100, 600])
def test_nobody_starves_beside_prompts_that_want_one_token(num_stages, num_clients, prompt_length):
    sim = simulation(1 + num_clients, num_stages)
    sim.scheduler.submit(Request(0, (1,), 900))
    for client in range(num_clients):
        sim.scheduler.submit(Request(1 + client, (1,) * prompt_length, 1))
    next_id = 1 + num_clients
    num_steps = 400
    for _ in range(num_steps):
        for event in sim.advance():
            if event.finish is not None:
                sim.scheduler.submit(Request(next_id, (1,) * prompt_length, 1))
                next_id += 1
    assert sim.tokens[0] >= num_steps / (4 * num_stages)
    chunks = -(-prompt_length // MIN_CHUNK_TOKENS)
    assert next_id > num_steps / (4 * num_stages * chunks)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    sim = simulation(4, 2, chunk_tokens=100)
    sim.scheduler.submit(Request(0, (1,) * 5000, 1))
    sim.advance()
    sim.scheduler.submit(Request(1, (1,) * 30, 1))
    asked_at = sim.now
    sim.run()
    # Behind the chunk under way, and in the next.
    assert sim.first_at[1] - asked_at <= 4 * seconds(101)


def test_a_long_prompt_does_not_wait_for_short_ones_that_keep_coming():
    sim = simulation(4, 2, chunk_tokens=100)
    sim.scheduler.submit(Request(0, (1,) * 5000, 1))
    for index in range(1, 1000):
        sim.scheduler.submit(Request(index, (1,) * 90, 1))
    while 0 not in sim.first_at:
        sim.advance()
    # Half of every step is its own.
    assert sim.first_at[0] <= 5000 / 50 * seconds(100) * 1.1


def test_a_prompt_is_cut_so_that_stages_work_on_it_together_but_not_into_crumbs():
    tokens = 4 * MIN_CHUNK_TOKENS
    for num_stages, expected in (
        (1, [tokens]),
        (2, [MIN_CHUNK_TOKENS] * 2),
        (16, [MIN_CHUNK_TOKENS] * 4),
    ):
        scheduler = Scheduler(Limits(1, 10_000, num_stages=num_stages))
        scheduler.submit(Request(0, (1,) * tokens, 1))
        steps = []
        while (step := scheduler.next_step()) is not None:
            steps.append(step)
        assert [step.header.num_tokens for step in steps] == expected


def test_a_prompt_keeps_no_stage_waiting_for_long_for_its_first_chunk_nor_its_last():
    for num_stages in (2, 3, 5):
        sim = simulation(1, num_stages)
        sim.scheduler.submit(Request(0, (1,) * 4000, 1))
        took = sim.run()
        assert took <= 1.2 * sim.busy / num_stages


def test_a_slot_is_cleared_at_once_however_much_is_under_way():
    scheduler = Scheduler(Limits(4, 10_000, chunk_tokens=64, num_stages=2))
    scheduler.submit(Request(0, (1,) * 1000, 1))
    assert [scheduler.next_step().header.kind for _ in range(2)] == [StepKind.STEP] * 2
    assert scheduler.next_step() is None
    scheduler.cancel(0)
    assert scheduler.next_step().header.kind is StepKind.TRUNCATE
    assert scheduler.next_step() is None
