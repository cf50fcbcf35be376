"""Many requests over one pipeline: each gets what it would get alone."""

import random
from dataclasses import replace

import pytest
import trio

from pipeline.engine.generation import Generation
from pipeline.engine.request import FinishReason
from pipeline.errors import InputError, PromptError
from pipeline.sampling.params import ChooserSpec, SamplingParams
from tests.pipeline.engine.engines import generation, tokens_of


async def settle(engine):
    for _ in range(200):
        if engine.stats.num_running == 0 and engine.stats.num_waiting == 0:
            return
        await trio.lowlevel.checkpoint()


async def test_requests_get_the_same_tokens_alone_and_in_company(engine):
    rng = random.Random(11)
    requests = [
        generation(rng, rng.randint(1, 20), temperature=rng.choice([0.0, 0.9]), seed=i)
        for i in range(24)
    ]
    alone = [await tokens_of(engine, request) for request in requests]
    together = {}

    async def join(index):
        await trio.sleep(rng.random() * 0.05)
        together[index] = await tokens_of(engine, requests[index])

    async with trio.open_nursery() as nursery:
        for index in range(len(requests)):
            nursery.start_soon(join, index)
    assert [together[index] for index in range(len(requests))] == alone
    assert all(len(tokens) == r.max_tokens for tokens, r in zip(alone, requests, strict=True))


async def test_leaving_the_context_frees_the_slot_on_every_stage(engine, cores):
    rng = random.Random(1)
    before = engine.stats.num_steps
    async with engine.generate(generation(rng, 60)) as stream:
        for _ in range(5):
            await stream.receive()
        steps_at_leave = engine.stats.num_steps
        assert any(core.cache.lengths[slot] for core in cores for slot in range(4))
    await settle(engine)
    while engine.stats.num_steps < steps_at_leave + 2:
        await trio.lowlevel.checkpoint()
    assert steps_at_leave > before
    assert all(core.cache.lengths[slot] == 0 for core in cores for slot in range(4))
    assert engine.stats.num_running == 0


async def test_requests_that_come_and_go_never_disturb_the_others(engine):
    rng = random.Random(4)
    steady = generation(rng, 40)
    expected = await tokens_of(engine, steady)

    async def flutter(seed):
        local = random.Random(seed)
        for _ in range(6):
            async with engine.generate(generation(local, 30)) as stream:
                for _ in range(local.randint(0, 6)):
                    await stream.receive()

    async with trio.open_nursery() as nursery:
        for seed in range(5):
            nursery.start_soon(flutter, seed)
        assert await tokens_of(engine, steady) == expected


async def test_a_client_that_never_reads_does_not_hold_up_others(engine):
    rng = random.Random(2)
    async with engine.generate(generation(rng, 50)):
        assert len(await tokens_of(engine, generation(rng, 50))) == 50


async def test_a_client_that_stops_listening_before_it_leaves_harms_nobody(engine):
    rng = random.Random(2)
    async with engine.generate(generation(rng, 50)) as stream:
        await stream.receive()
        await stream.aclose()
        assert len(await tokens_of(engine, generation(rng, 10))) == 10


async def test_the_last_output_says_why_it_is_the_last(engine):
    rng = random.Random(3)
    request = generation(rng, 10)
    async with engine.generate(request) as stream:
        outputs = [output async for output in stream]
    assert [output.finish for output in outputs[:-1]] == [None] * 9
    assert outputs[-1].finish is FinishReason.LENGTH
    stop = Generation(request.prompt_ids, 10, frozenset({outputs[4].token_id}), request.sampling)
    async with engine.generate(stop) as stream:
        outputs = [output async for output in stream]
    assert outputs[-1].finish is FinishReason.EOS


async def test_a_prompt_that_cannot_fit_is_refused_before_anything_runs(engine):
    with pytest.raises(PromptError):
        async with engine.generate(Generation(tuple(range(200)), 1, frozenset(), SamplingParams())):
            raise AssertionError("entered")


async def test_what_cannot_be_had_is_refused_before_anything_runs(engine):
    plain = generation(random.Random(16), 12)
    with pytest.raises(InputError, match="min_tokens is 13"):
        replace(plain, sampling=SamplingParams(min_tokens=13))
    unknown = SamplingParams(temperature=1.0, chooser=ChooserSpec("dice"))
    with pytest.raises(InputError, match="dice"):
        async with engine.generate(replace(plain, sampling=unknown)):
            raise AssertionError("entered")
    assert not engine.scheduler.has_work
