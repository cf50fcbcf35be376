"""Stages that are lost, and requests that fail, cost no request but their own."""

import random
from dataclasses import replace

import numpy as np
import pytest
import trio

from pipeline.engine.engine import PipelineEngine
from pipeline.errors import InputError, RequestFailed, SessionError
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.protocol.result_kinds import Want
from pipeline.sampling.params import SamplingParams
from tests.pipeline.engine.engines import (
    LIMITS,
    Breaking,
    Yielding,
    generation,
    mended,
    new_cores,
    tokens_of,
)


class Overflowing(Yielding):
    """Its last stage has no numbers for whoever owns a slot."""

    def __init__(self, local, cores, slot):
        super().__init__(local)
        self._values, self._slot = cores[-1].cache.values, slot

    async def receive(self):
        for layer in self._values:
            layer[self._slot] = np.nan
        return await super().receive()


@pytest.mark.parametrize(
    ("sampling", "has_processor"),
    [({}, False), ({"temperature": 1.0}, False), ({"logprobs": 2}, False), ({}, True)],
    ids=str,
)
async def test_a_model_without_numbers_ends_the_request_and_no_other(
    shards, nursery, sampling, has_processor
):
    cores = new_cores(shards)
    engine = PipelineEngine(LIMITS)
    nursery.start_soon(engine.run, Overflowing(LocalPipeline(cores), cores, 0))
    rng = random.Random(14)
    doomed, steady = generation(rng, 30, **sampling), generation(rng, 30)
    if has_processor:
        doomed = replace(doomed, processors=(lambda token_ids, logits: logits,))

    async with engine.generate(doomed) as stream:  # in the first slot, for it came first
        found = await tokens_of(engine, steady)
        with pytest.raises(RequestFailed, match="no token can be chosen"):
            [output async for output in stream]
    assert len(found) == 30
    assert engine.failure is None


async def test_a_lone_text_ends_where_the_model_has_no_numbers(shards):
    cores = new_cores(shards)
    engine = PipelineEngine(LIMITS)
    heard = []
    engine.submit(generation(random.Random(1), 9), heard.append)
    await engine.drain(Overflowing(LocalPipeline(cores), cores, 0))
    assert isinstance(heard.pop(), RequestFailed)
    assert len(heard) == 1  # the prompt's, computed before


async def test_a_pipeline_failure_reaches_every_open_request(cores, nursery):
    engine = PipelineEngine(LIMITS)

    async def run():
        try:
            await engine.run(Breaking(LocalPipeline(cores), 5))
        except SessionError as error:
            engine.fail(error)

    nursery.start_soon(run)
    rng = random.Random(6)
    with pytest.raises(SessionError, match="stage 1 is lost"):
        await tokens_of(engine, generation(rng, 50))
    with pytest.raises(SessionError, match="stage 1 is lost"):
        await tokens_of(engine, generation(rng, 5))


async def test_requests_survive_any_number_of_losses_token_for_token(shards, engine):
    """Each time either stage begins with nothing; the other one keeps what is certain."""
    rng = random.Random(8)
    requests = [
        generation(rng, 15, temperature=temperature, seed=3) for temperature in (0.0, 0.0, 0.8, 0.8)
    ]
    expected = [await tokens_of(engine, request) for request in requests]
    failing = PipelineEngine(LIMITS)
    losses = []

    async def run():
        cores = new_cores(shards)
        while True:
            try:
                await failing.run(Breaking(LocalPipeline(cores), rng.randint(2, 6)))
            except SessionError:
                victim = len(losses) % 3
                losses.append(victim)
                cores = mended(failing.scheduler, cores, shards, victim)

    found = {}

    async def collect(index):
        found[index] = await tokens_of(failing, requests[index])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        async with trio.open_nursery() as clients:
            for index in range(len(requests)):
                clients.start_soon(collect, index)
        nursery.cancel_scope.cancel()
    assert [found[index] for index in range(len(requests))] == expected
    assert set(losses) == {0, 1, 2}


async def test_a_processor_that_fails_costs_its_own_request_alone(engine):
    rng = random.Random(9)
    calls = []

    def process(token_ids, logits):
        calls.append(1)
        raise ZeroDivisionError

    steady = generation(rng, 30)
    doomed = replace(generation(rng, 30, temperature=1.0, seed=1), processors=(process,))
    expected = await tokens_of(engine, steady)

    async def fail():
        with pytest.raises(RequestFailed, match="ZeroDivisionError"):
            await tokens_of(engine, doomed)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        assert await tokens_of(engine, steady) == expected
    assert calls == [1]


def forbids_all_after_three(token_ids, logits):
    return logits if len(token_ids) % 4 else np.full_like(logits, -np.inf)


class AllowsThree:
    def allowed(self, generated, vocab_size):
        return np.full(vocab_size, len(generated) < 3)


@pytest.mark.parametrize(
    "own",
    [
        {"masks": (AllowsThree(),)},
        {"masks": (AllowsThree(),), "vocab_size": 256},
        {"processors": (forbids_all_after_three,)},
        {"masks": (AllowsThree(),), "sampling": SamplingParams(temperature=1.0, logprobs=2)},
        {"eos_token_ids": frozenset({7}),
         "sampling": SamplingParams(allowed_token_ids=(7,), min_tokens=1)},
        {"eos_token_ids": frozenset({7}), "vocab_size": 256,
         "sampling": SamplingParams(allowed_token_ids=(7,), min_tokens=1)},
    ],
    ids=["mask", "remote mask", "processor", "drawn", "fields", "remote"],
)  # fmt: skip
async def test_masks_of_its_own_that_leave_nothing_are_a_requests_mistake_and_nobody_elses(
    engine, own
):
    rng = random.Random(21)
    steady = generation(rng, 30)
    mistaken = replace(generation(rng, 30), prompt_ids=(1, 2, 3, 4, 5), **own)
    expected, heard = await tokens_of(engine, steady), []

    async def hear():
        async with engine.generate(mistaken) as stream:
            async for output in stream:
                heard.append(output)

    async def fail():
        with pytest.raises(InputError, match="leave no token"):
            await hear()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        assert await tokens_of(engine, steady) == expected
    assert len(heard) == (0 if "eos_token_ids" in own else 3)
    assert engine.failure is None
    assert engine.stats.num_tokens == 60 + len(heard)


class FailsAfterThree:
    def __init__(self, is_large):
        self._is_large = is_large

    def allowed(self, generated, vocab_size):
        if len(generated) < 3:
            return None
        return np.ones(vocab_size + 8, np.bool_) if self._is_large else {}["no such state"]


@pytest.mark.parametrize("is_large", [False, True])
async def test_a_mask_that_fails_while_a_step_is_made_up_fails_its_request_alone(engine, is_large):
    rng = random.Random(23)
    steady = generation(rng, 30)
    doomed = replace(generation(rng, 30), masks=(FailsAfterThree(is_large),), vocab_size=256)
    assert doomed.want == Want.DRAWN
    expected = await tokens_of(engine, steady)

    async def fail():
        with pytest.raises(RequestFailed, match="ValueError" if is_large else "KeyError"):
            await tokens_of(engine, doomed)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        assert await tokens_of(engine, steady) == expected
    assert engine.failure is None


async def test_tokens_that_nobody_hears_of_are_not_counted(cores):
    engine, heard = PipelineEngine(LIMITS), []

    def hear(output):
        heard.append(output)
        if len(heard) == 5:  # while the step of the sixth is under way
            engine.cancel(request_id)

    request_id = engine.submit(generation(random.Random(22), 60), hear)
    await engine.drain(Yielding(LocalPipeline(cores)))
    assert len(heard) == engine.stats.num_tokens == 5


class Poisoned(Yielding):
    """Is lost whenever one token is in a step."""

    def __init__(self, local, poison):
        super().__init__(local)
        self._poison = poison

    async def receive(self):
        result = await super().receive()
        if self._poison in result.token_ids:
            raise SessionError("stage 1 is lost")
        return result


async def test_a_request_that_breaks_the_stages_every_time_ends_alone(shards, engine):
    rng = random.Random(12)
    requests = [generation(rng, 30) for _ in range(4)]
    expected = [await tokens_of(engine, request) for request in requests]
    others = {token for tokens in expected[:3] for token in tokens}
    poison = next(token for token in expected[3] if token not in others)
    poisoned = PipelineEngine(replace(LIMITS, num_stages=2))
    num_losses = 0

    async def run():
        nonlocal num_losses
        cores = new_cores(shards)
        while True:
            try:
                await poisoned.run(Poisoned(LocalPipeline(cores), poison))
            except SessionError:
                num_losses += 1
                cores = mended(poisoned.scheduler, cores, shards, 2)

    found = {}

    async def collect(index):
        async with poisoned.generate(requests[index]) as stream:
            found[index] = []
            async for output in stream:
                found[index].append(output.token_id)

    async def fail():
        with pytest.raises(RequestFailed, match="whenever"):
            await collect(3)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        async with trio.open_nursery() as clients:
            for index in range(3):
                clients.start_soon(collect, index)
            clients.start_soon(fail)
        assert await tokens_of(poisoned, requests[0]) == expected[0]
        nursery.cancel_scope.cancel()
    assert [found[index] for index in range(3)] == expected[:3]
    assert found[3] == expected[3][: expected[3].index(poison)]
    assert num_losses == 4
    assert poisoned.stats.num_running == 0
