"""A program of one's own drives real stages."""

from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from pipeline.api import (
    DevTrust,
    FinishReason,
    RetryPolicy,
    SamplingParams,
    TimeLimits,
    Tokenizer,
    connect,
    load_manifest,
)
from pipeline.api.connection import GREEDY
from pipeline.errors import PromptError, RequestTimedOut, SessionError


async def text_of(pipeline, prompt_ids, count, sampling=GREEDY):
    return [
        token.token_id
        async for token in pipeline.generate(prompt_ids, count, sampling, frozenset())
    ]


@pytest.fixture
def trust(cluster):
    return DevTrust.create(Path(cluster.environment["VEILPIPE_DEV_DIR"]))


async def test_texts_side_by_side_are_those_of_texts_alone(cluster, trust):
    cluster.plan(2)
    cluster.start_worker(0)
    lost = cluster.start_worker(1)
    manifest = load_manifest(cluster.manifest)
    prompt_ids = Tokenizer(cluster.model_dir / "tokenizer.json").encode("Hello there")
    drawn = SamplingParams(temperature=1.0, seed=7)
    async with connect(manifest, trust, max_requests=2, context=64) as pipeline:
        alone = [await text_of(pipeline, prompt_ids, 12, each) for each in (GREEDY, drawn)]
        both = [None, None]

        async def generate(place, options):
            both[place] = await text_of(pipeline, prompt_ids, 12, options)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, 0, GREEDY)
            nursery.start_soon(generate, 1, drawn)
        assert both == alone

        async with aclosing(pipeline.generate(prompt_ids, 50)) as tokens:
            assert (await anext(tokens)).token_id == alone[0][0]
        rest = pipeline.generate(prompt_ids, 3, GREEDY, frozenset())
        last = [token async for token in rest]
        assert [token.finish for token in last] == [None, None, FinishReason.LENGTH]
        with pytest.raises(PromptError, match="64"):
            await text_of(pipeline, prompt_ids * 99, 1)
        lost.kill()
        lost.wait()
        cluster.start_worker(1)
        assert await text_of(pipeline, prompt_ids, 12) == alone[0]


async def test_stages_that_are_not_there_are_named(cluster, trust):
    cluster.plan(2)
    times = TimeLimits(connect_seconds=0.5)
    with pytest.raises(SessionError, match=r"stage [01]"):
        async with connect(load_manifest(cluster.manifest), trust, times=times):
            raise AssertionError("nobody is there")


async def test_a_stage_that_is_not_up_at_any_attempt_is_named_before_patience_ends(cluster, trust):
    cluster.plan(1)
    times = TimeLimits(connect_seconds=3600, retry=RetryPolicy(attempts=3))
    with pytest.raises(SessionError, match=r"stage 0's control channel at .*attempts made: 3"):
        async with connect(load_manifest(cluster.manifest), trust, times=times):
            raise AssertionError("nobody is there")


async def test_a_text_that_takes_too_long_ends_alone(cluster, trust):
    cluster.plan(1)
    cluster.start_worker(0)
    manifest = load_manifest(cluster.manifest)
    times = TimeLimits(request_seconds=0.2)
    async with connect(manifest, trust, times=times, context=4096) as pipeline:
        with pytest.raises(RequestTimedOut, match=r"0\.2 s"):
            await text_of(pipeline, [1, 2, 3], 4000)
        pipeline._request_seconds = None  # however slow this machine is just now
        assert len(await text_of(pipeline, [1, 2, 3], 3)) == 3
