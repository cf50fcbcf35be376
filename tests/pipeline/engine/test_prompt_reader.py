"""What is told of a prompt's own rows is the model's word on them, whatever happens around it."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
import trio

from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.prompt_reader import PromptMeaning, PromptScores
from pipeline.errors import InputError, RequestFailed, SessionError
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.models.config import load_config
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.orchestrator.client_ends import ClientEnds
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.protocol.result_kinds import NO_TOKEN
from pipeline.sampling.params import SamplingParams
from pipeline.stage.step_executor import StageCore
from tests.pipeline.engine.engines import (
    LIMITS,
    Breaking,
    Yielding,
    generation,
    mended,
    new_cores,
    tokens_of,
)

TOP = 3
PROMPT = tuple(random.Random(21).randrange(255) for _ in range(57))


@pytest.fixture(scope="module")
def oracle(tiny_model):
    """What `transformers` says: log-probabilities [rows, vocab], and rows before the norm."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    rows = []
    model.model.norm.register_forward_pre_hook(lambda _, args: rows.append(args[0][0].numpy()))

    def ask(prompt_ids):
        rows.clear()
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids])).logits[0]
        return torch.log_softmax(logits.double(), -1).numpy(), rows[0].astype(np.float64)

    return ask


def scored(prompt_ids=PROMPT, max_tokens=0, num_top=TOP, **more):
    return Generation(
        tuple(prompt_ids),
        max_tokens,
        frozenset(),
        SamplingParams(),
        reader=PromptScores(prompt_ids, num_top),
        **more,
    )


def meant(prompt_ids=PROMPT, *, is_mean=True):
    reader = PromptMeaning(len(prompt_ids), is_mean=is_mean)
    return Generation(tuple(prompt_ids), 0, frozenset(), SamplingParams(), reader=reader)


def scores(request):
    return [request.reader.at(index) for index in range(1, len(request.prompt_ids))]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
async def test_every_token_of_a_prompt_has_the_models_log_probability(engine, oracle, max_tokens):
    request = scored(max_tokens=max_tokens)
    tokens = await tokens_of(engine, request)
    expected, _ = oracle(PROMPT)
    for index, score in enumerate(scores(request)):
        row = expected[index]
        assert score.token_id == PROMPT[index + 1]
        assert score.logprob == pytest.approx(row[score.token_id], abs=1e-5)
        likeliest = pytest.approx(np.sort(row)[: -TOP - 1 : -1].tolist(), abs=1e-5)
        assert [row[each] for each, _ in score.top] == likeliest
        assert [logprob for _, logprob in score.top] == likeliest
    plain = Generation(PROMPT, max_tokens or 1, frozenset(), SamplingParams())
    assert tokens == ([NO_TOKEN] if max_tokens == 0 else await tokens_of(engine, plain))


@pytest.mark.parametrize("is_mean", [True, False])
async def test_a_prompts_meaning_is_that_of_the_last_layers_rows(engine, oracle, is_mean):
    request = meant(is_mean=is_mean)
    assert await tokens_of(engine, request) == [NO_TOKEN]
    _, rows = oracle(PROMPT)
    rows /= np.sqrt((rows * rows).mean(axis=1, keepdims=True))
    expected = rows.mean(axis=0) if is_mean else rows[-1]
    np.testing.assert_allclose(
        request.reader.vector(), expected / np.linalg.norm(expected), atol=1e-5
    )
    short = request.reader.vector(8)
    np.testing.assert_allclose(short, expected[:8] / np.linalg.norm(expected[:8]), atol=1e-5)


async def test_a_prompt_of_one_token_has_nothing_to_score(engine):
    request = scored(PROMPT[:1])
    assert await tokens_of(engine, request) == [NO_TOKEN]
    assert engine.stats.num_steps == 0
    request = scored(PROMPT[:1], max_tokens=2)
    assert len(await tokens_of(engine, request)) == 2


def test_nothing_can_be_asked_for():
    with pytest.raises(InputError, match="max_tokens is 0"):
        Generation(PROMPT, 0, frozenset(), SamplingParams())


async def test_company_and_chunks_change_no_bit(tiny_model, nursery):
    """With native kernels: those of torch round otherwise in steps of other sizes."""
    if why := why_not_native():
        pytest.skip(f"no native kernels: {why}")
    config = load_config(tiny_model)
    shards = [
        load_shard(tiny_model, config, *layers, kernels="native", expected_hashes=None)
        for layers in ((0, 2), (2, 4))
    ]

    async def told(limits, company):
        engine = PipelineEngine(limits)
        rng = random.Random(5)
        mine = [scored(), scored(max_tokens=3), meant(), meant(is_mean=False)]
        others = [generation(rng, 30, temperature=1.0, seed=each) for each in range(company)]
        others += [scored(PROMPT[:29]), meant(PROMPT[:33])] if company else []
        async with trio.open_nursery() as tasks:
            tasks.start_soon(engine.run, Yielding(LocalPipeline(new_cores(shards))))
            async with trio.open_nursery() as asked:
                for request in (*others[::2], *mine, *others[1::2]):
                    asked.start_soon(tokens_of, engine, request)
            tasks.cancel_scope.cancel()
        return (
            scores(mine[0]),
            scores(mine[1]),
            mine[2].reader.vector().tobytes(),
            mine[3].reader.vector().tobytes(),
        )

    alone = await told(LIMITS, 0)
    assert alone[0] == alone[1]
    for chunk, company in ((16, 4), (7, 3), (128, 2)):
        assert await told(replace(LIMITS, chunk_tokens=chunk), company) == alone


async def test_what_slots_hold_already_is_computed_again_for_who_reads_it(shards, nursery):
    engine = PipelineEngine(LIMITS, prefixes=PrefixOptions(1.0, 600.0))
    engine.allow_reuse(is_row_exact=True)
    nursery.start_soon(engine.run, Yielding(LocalPipeline(new_cores(shards))))
    cold = scored(salt=b"mine")
    await tokens_of(engine, cold)
    again = scored(salt=b"mine")
    async with engine.generate(again) as stream:
        assert [output.num_cached async for output in stream] == [0]
    assert scores(again) == scores(cold)
    goes_on = Generation(PROMPT, 1, frozenset(), SamplingParams(), salt=b"mine")
    async with engine.generate(goes_on) as stream:
        assert [output.num_cached async for output in stream] == [len(PROMPT) - 1]


async def test_losses_change_nothing_of_what_is_told(shards, engine):
    rng = random.Random(4)
    mine = [scored(max_tokens=4), scored(PROMPT[:40]), meant()]
    calm = [scored(max_tokens=4), scored(PROMPT[:40]), meant()]
    for request in calm:
        await tokens_of(engine, request)
    failing = PipelineEngine(LIMITS)
    losses = []

    async def run():
        cores = new_cores(shards)
        while True:
            try:
                await failing.run(Breaking(LocalPipeline(cores), rng.randint(1, 3)))
            except SessionError:
                victim = len(losses) % 3
                losses.append(victim)
                cores = mended(failing.scheduler, cores, shards, victim)

    async with trio.open_nursery() as tasks:
        tasks.start_soon(run)
        async with trio.open_nursery() as asked:
            for request in mine:
                asked.start_soon(tokens_of, failing, request)
        tasks.cancel_scope.cancel()
    assert losses
    for found, expected in zip(mine[:2], calm[:2], strict=True):
        assert [each.token_id for each in scores(found)] == [
            each.token_id for each in scores(expected)
        ]
        assert [each.logprob for each in scores(found)] == pytest.approx(
            [each.logprob for each in scores(expected)], abs=1e-5
        )
    np.testing.assert_allclose(mine[2].reader.vector(), calm[2].reader.vector(), atol=1e-5)


class Overflowing(Yielding):
    """Its first stage has no numbers, for anybody."""

    async def send(self, step):
        for layer in self._local._stages[0].cache.values:
            layer[:] = np.nan
        await super().send(step)


@pytest.mark.parametrize("make", [scored, meant])
async def test_a_model_without_numbers_ends_who_reads_them(shards, nursery, make):
    engine = PipelineEngine(LIMITS)
    nursery.start_soon(engine.run, Overflowing(LocalPipeline(new_cores(shards))))
    with pytest.raises(RequestFailed, match="no numbers"):
        await tokens_of(engine, make())
    assert engine.failure is None


async def test_ends_held_at_home_tell_the_same(tiny_model, engine):
    config = load_config(tiny_model)
    codec = make_codec("F32", 64)
    limits = LIMITS.for_session(codec, has_client_ends=True)
    core = StageCore(
        load_shard(tiny_model, config, 0, 4, ends=NO_ENDS, expected_hashes=None), limits
    )
    home = load_shard(tiny_model, config, 0, 0, ends=BOTH_ENDS, expected_hashes=None)
    split = PipelineEngine(LIMITS)
    mine, theirs = [scored(), meant()], [scored(), meant()]
    async with trio.open_nursery() as tasks:
        tasks.start_soon(split.run, Yielding(LocalPipeline([core], ClientEnds(home, codec))))
        for request in mine:
            assert await tokens_of(split, request) == [NO_TOKEN]
        tasks.cancel_scope.cancel()
    for request in theirs:
        await tokens_of(engine, request)
    assert scores(mine[0]) == scores(theirs[0])
    assert mine[1].reader.vector().tobytes() == theirs[1].reader.vector().tobytes()
