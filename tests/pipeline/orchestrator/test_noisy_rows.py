"""Noise on the rows that leave: always the same for the same row, and no row that is not paid."""

from random import Random

import numpy as np
import pytest

from pipeline.codecs.gaussian_noise import KEY_BYTES, GaussianNoise
from pipeline.codecs.privacy_budget import PrivacyBudget
from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.errors import BudgetSpent, LinkLost, PromptError
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.orchestrator.client_ends import ClientEnds
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.protocol.step_header import StepKind
from pipeline.stage.step_executor import StageCore
from tests.pipeline.orchestrator.test_client_ends import LIMITS, SAMPLING, load, new_pipeline, texts

SIGMA, CLIP = 0.05, 3.0
# Enough for anything here.
GENEROUS = PrivacyBudget(SIGMA, CLIP, 1e12, 1e-5).epsilon


class RecordingEnds(ClientEnds):
    """Remembers the rows that left, by request and position, and can lose a step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.rows, self.num_begun, self.lost_at = {}, 0, None

    def begin(self, step):
        header, tensors = super().begin(step)
        if header.kind is not StepKind.TRUNCATE:
            rows = iter(self._codec.decode(tensors).copy())
            for request, (_, position, num_tokens) in zip(
                step.requests, header.segments, strict=True
            ):
                for place in range(position, position + num_tokens):
                    self.rows.setdefault((request, place), set()).add(next(rows).tobytes())
        self.num_begun += 1
        if self.num_begun == self.lost_at:
            raise LinkLost(0, "its machine has burnt down")
        return header, tensors


@pytest.fixture(scope="module")
def oracle(make_oracle, native):
    return make_oracle("gpt2").computing_with(native)


def noisy_pipeline(oracle, sigma=SIGMA, clip=CLIP, key=bytes(KEY_BYTES)):
    width = oracle.config.hidden_dim
    codec = make_codec("F32", width)
    ends = RecordingEnds(
        load(oracle, 0, 0, BOTH_ENDS), codec, GaussianNoise(sigma, clip, width, key)
    )
    limits = LIMITS.for_session(codec, has_client_ends=True)
    edges = ((0, 2), (2, oracle.config.num_layers))
    stages = [StageCore(load(oracle, *edge, NO_ENDS), limits) for edge in edges]
    return LocalPipeline(stages, ends), ends


def mended(oracle, engine, ends):
    """New stages in place of lost ones, told again what those knew."""
    engine.scheduler.rewind()
    fresh, _ = noisy_pipeline(oracle)
    for step in engine.scheduler.replay(1):
        header, tensors = ends.begin(step)
        for stage in fresh._stages:
            tensors = stage.step(header, tensors)
    return LocalPipeline(fresh._stages, ends)


class Crowd:
    """Requests that come whenever others are heard of, and may leave before or while they run."""

    def __init__(self, seed):
        self.random = Random(seed)
        self.num_refused = 0

    def submit(self, engine, check):
        random, ids = self.random, []
        prompt_ids = tuple(random.randrange(99) for _ in range(random.randint(1, 14)))
        sampling = random.choice(SAMPLING)

        def hear(event):
            check()
            if random.random() < 0.15:
                engine.cancel(ids[0])
            if random.random() < 0.15:
                self.submit(engine, check)

        try:
            generation = Generation(prompt_ids, random.randint(3, 9), frozenset(), sampling)
            ids.append(engine.submit(generation, hear))
        except PromptError:
            self.num_refused += 1
            return
        if random.random() < 0.2:
            engine.cancel(ids[0])


def submit_all(engine, heard, num_tokens=14):
    for index, each in enumerate(SAMPLING):
        prompt_ids = tuple(range(3 + index, 24 + 2 * index))
        engine.submit(Generation(prompt_ids, num_tokens, frozenset(), each), heard[index].append)


async def test_a_batch_without_noise_worth_the_name_says_what_it_says_without(oracle):
    expected = await texts(new_pipeline(oracle, (2,), is_client=True))
    pipeline, ends = noisy_pipeline(oracle, sigma=1e-30, clip=1e9)
    assert await texts(pipeline) == expected
    noisy, _ = noisy_pipeline(oracle, sigma=0.3)
    assert await texts(noisy) != expected
    assert len(ends.rows) == sum(21 + index + 14 - 1 for index in range(len(SAMPLING)))


@pytest.mark.parametrize("lost_at", [2, 5, 14])
async def test_what_is_sent_again_after_a_loss_is_the_same_bytes_and_costs_nothing(oracle, lost_at):
    undisturbed, all_rows = [[] for _ in SAMPLING], None
    for is_lost in (False, True):
        pipeline, ends = noisy_pipeline(oracle)
        budget = PrivacyBudget(SIGMA, CLIP, GENEROUS, 1e-5)
        engine, heard = PipelineEngine(LIMITS, budget), [[] for _ in SAMPLING]
        submit_all(engine, heard)
        if is_lost:
            ends.lost_at = lost_at
            with pytest.raises(LinkLost):
                await engine.drain(pipeline)
            pipeline = mended(oracle, engine, ends)
        await engine.drain(pipeline)
        assert {len(sent) for sent in ends.rows.values()} == {1}
        assert budget.num_spent == len(ends.rows)
        if is_lost:
            assert heard == undisturbed
            assert ends.rows == all_rows
            assert ends.num_begun > lost_at
        undisturbed, all_rows = heard, ends.rows


async def test_a_budget_that_ends_in_the_middle_ends_every_request_with_one_clear_error(oracle):
    pipeline, _ = noisy_pipeline(oracle)
    unbounded = [[] for _ in SAMPLING]
    engine = PipelineEngine(LIMITS)
    submit_all(engine, unbounded)
    await engine.drain(pipeline)

    num_prompt = sum(21 + index for index in range(len(SAMPLING)))
    budget = PrivacyBudget(SIGMA, CLIP, GENEROUS, 1e-5)
    budget = PrivacyBudget(SIGMA, CLIP, budget.composed_epsilon(num_prompt + 23), 1e-5)
    assert budget.max_rows == num_prompt + 23
    pipeline, ends = noisy_pipeline(oracle)
    engine, heard = PipelineEngine(LIMITS, budget), [[] for _ in SAMPLING]
    submit_all(engine, heard)
    await engine.drain(pipeline)
    failures = [events[-1] for events in heard]
    assert any(isinstance(each, BudgetSpent) for each in failures)
    for events, whole in zip(heard, unbounded, strict=True):
        told = [event for event in events if not isinstance(event, BudgetSpent)]
        assert len(events) - len(told) <= 1
        assert told == whole[: len(told)]
        assert told
    assert len(ends.rows) <= budget.max_rows
    assert budget.num_spent == budget.max_rows
    with pytest.raises(PromptError, match="before it"):
        engine.submit(Generation((1,), 1, frozenset(), SAMPLING[0]), print)
    assert not engine.scheduler.has_work


async def test_a_lone_greedy_request_sends_no_row_beyond_the_bound(oracle):
    """Its next step is otherwise promised before its token is paid."""
    budget = PrivacyBudget(SIGMA, CLIP, GENEROUS, 1e-5)
    budget = PrivacyBudget(SIGMA, CLIP, budget.composed_epsilon(8), 1e-5)
    pipeline, ends = noisy_pipeline(oracle)
    engine, heard = PipelineEngine(LIMITS, budget), []
    engine.submit(Generation((5, 6, 7, 8, 9), 30, frozenset(), SAMPLING[0]), heard.append)
    await engine.drain(pipeline)
    assert len(ends.rows) == 8
    assert len(heard) == 5
    assert isinstance(heard[-1], BudgetSpent)


async def test_what_is_given_up_before_it_was_sent_is_paid_back(oracle):
    budget = PrivacyBudget(SIGMA, CLIP, GENEROUS, 1e-5)
    pipeline, ends = noisy_pipeline(oracle)
    engine, heard = PipelineEngine(LIMITS, budget), []
    given_up = engine.submit(Generation((5, 6, 7), 3, frozenset(), SAMPLING[0]), heard.append)
    assert budget.num_spent == 3
    assert engine.cancel(given_up)
    assert budget.num_spent == 0
    engine.submit(Generation((5, 6), 3, frozenset(), SAMPLING[0]), heard.append)
    await engine.drain(pipeline)
    assert len(heard) == 3
    assert budget.num_spent == len(ends.rows) == 4


@pytest.mark.parametrize("seed", range(6))
async def test_never_is_more_sent_than_spent_whoever_comes_leaves_or_is_lost(oracle, seed):
    crowd = Crowd(seed)
    budget = PrivacyBudget(SIGMA, CLIP, GENEROUS, 1e-5)
    bound = budget.composed_epsilon(crowd.random.randint(20, 90))
    budget = PrivacyBudget(SIGMA, CLIP, bound, 1e-5)
    pipeline, ends = noisy_pipeline(oracle)
    engine = PipelineEngine(LIMITS, budget)

    def check():
        assert len(ends.rows) <= budget.num_spent <= budget.max_rows

    for _ in range(8):
        for _ in range(crowd.random.randint(1, 3)):
            crowd.submit(engine, check)
        ends.lost_at = ends.num_begun + crowd.random.randint(1, 12)
        while engine.scheduler.has_work:
            try:
                await engine.drain(pipeline)
            except LinkLost:
                pipeline = mended(oracle, engine, ends)
        assert {len(sent) for sent in ends.rows.values()} <= {1}
        assert len(ends.rows) == budget.num_spent <= budget.max_rows
    assert crowd.num_refused


async def test_a_prompt_beyond_the_bound_is_refused_and_nothing_of_it_is_sent(oracle):
    budget = PrivacyBudget(SIGMA, CLIP, 2.0, 1e-5)
    pipeline, ends = noisy_pipeline(oracle)
    engine = PipelineEngine(LIMITS, budget)
    with pytest.raises(PromptError, match="it would take --dp-epsilon"):
        engine.submit(Generation((5, 6), 3, frozenset(), SAMPLING[0]), print)
    await engine.drain(pipeline)
    assert ends.rows == {}


async def test_no_row_leaves_as_it_is(oracle):
    pipeline, noisy = noisy_pipeline(oracle)
    plain, clean = noisy_pipeline(oracle, sigma=1e-30)
    for each in (pipeline, plain):
        engine = PipelineEngine(LIMITS)
        engine.submit(Generation(tuple(range(20)), 1, frozenset(), SAMPLING[0]), print)
        await engine.drain(each)
    for place, (row,) in noisy.rows.items():
        (other,) = clean.rows[place]
        difference = np.frombuffer(row, np.float32) - np.frombuffer(other, np.float32)
        assert np.std(difference) == pytest.approx(SIGMA, rel=0.4)
