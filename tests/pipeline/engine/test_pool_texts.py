"""Requests that give way on stages that compute: each text is what it is alone, token by token."""

import random
from dataclasses import replace

import numpy as np
import pytest
import trio

from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.idle_prefixes import NO_PREFIXES, PrefixOptions
from pipeline.errors import PromptError
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.stage.step_executor import StageCore
from tests.pipeline.engine.engines import LIMITS, Yielding, generation, tokens_of

POOL = 150
SAMPLINGS = [
    {},
    {"temperature": 0.9},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.1, "frequency_penalty": 0.7, "logprobs": 2},
]


class Follows:
    """A form that every token depends on: a third of the vocabulary, said by the one before."""

    def allowed(self, generated, vocab_size, /):
        last = generated[-1] if generated else 0
        return (np.arange(vocab_size) + len(generated)) % 3 == last * 7 % 3


def new_engine(shards, nursery, prefixes=NO_PREFIXES):
    limits = LIMITS.for_session(make_codec("F32", 64))
    row_bytes = shards[0].kv_bytes(1, 16) // 16
    cores = [StageCore(shard, limits, None, POOL * row_bytes) for shard in shards]
    assert {core.num_tokens for core in cores} == {POOL}
    engine = PipelineEngine(LIMITS, prefixes=prefixes)
    engine.allow_reuse(all(shard.is_row_exact for shard in shards))
    engine.scheduler.use_pool(POOL)
    nursery.start_soon(engine.run, Yielding(LocalPipeline(cores)))
    return engine, cores


def requests(masks=()):
    rng = random.Random(5)
    for index in range(10):
        sampling = SAMPLINGS[index % len(SAMPLINGS)]
        request = generation(
            rng, rng.randint(40, 60), seed=index, **({"temperature": 0} | sampling)
        )
        # As a client whose texts are kept; of some the tokens are chosen at home.
        at_home = index % 5 == 0
        yield replace(request, salt=b"whose", samples_at_home=at_home, vocab_size=256, masks=masks)


@pytest.mark.parametrize("masks", [(), (Follows(),)], ids=["free", "of-a-form"])
@pytest.mark.parametrize("prefixes", [NO_PREFIXES, PrefixOptions(0.75)], ids=["none", "kept"])
async def test_texts_are_those_of_requests_alone_however_often_they_give_way(
    shards, nursery, prefixes, masks
):
    alone, _ = new_engine(shards, nursery)
    expected = [await tokens_of(alone, request) for request in requests(masks)]
    engine, cores = new_engine(shards, nursery, prefixes)
    texts = {}

    async def ask(index, request):
        texts[index] = await tokens_of(engine, request)

    async with trio.open_nursery() as asking:
        for index, request in enumerate(requests(masks)):
            asking.start_soon(ask, index, request)
    assert [texts[index] for index in range(len(expected))] == expected
    assert engine.stats.num_given_way > 0
    assert alone.stats.num_given_way == 0
    assert engine.stats.pool_tokens == POOL
    if prefixes is NO_PREFIXES:
        while engine.scheduler.has_work:
            await trio.lowlevel.checkpoint()
        assert engine.stats.held_tokens == 0
        assert not any(any(core.cache.lengths) for core in cores)


async def test_who_leaves_while_others_wait_for_its_room_lets_them_go_on(shards, nursery):
    engine, _ = new_engine(shards, nursery)
    asked = list(requests())
    async with engine.generate(replace(asked[0], max_tokens=100)) as stream:
        async with engine.generate(asked[1]) as other:
            await stream.receive()
            await other.receive()
        assert len(await tokens_of(engine, asked[2])) == asked[2].max_tokens


async def test_what_can_never_fit_is_refused_with_the_limit(shards, nursery):
    engine, _ = new_engine(shards, nursery)
    engine.scheduler.use_pool(40)
    assert engine.max_seq_len == 40
    (request, *_) = requests()
    with pytest.raises(PromptError, match="40 tokens and the context holds 40"):
        engine.submit(replace(request, prompt_ids=(1,) * 40), lambda _: None)
