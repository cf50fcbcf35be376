"""Texts that go on from what others have left, under a window: those of a cold run."""

import random

import numpy as np
import pytest
import trio

from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.idle_prefixes import NO_PREFIXES, PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.protocol.tide_window import TideWindow
from pipeline.sampling.params import SamplingParams
from pipeline.stage.step_executor import StageCore
from tests.pipeline.engine.engines import Yielding

WINDOW = TideWindow(40, 4)


@pytest.fixture(scope="module")
def shards(tiny_model):
    if why := why_not_native():
        pytest.skip(f"no native kernels: {why}")
    config = load_config(tiny_model)
    return [
        load_shard(tiny_model, config, *layers, kernels="native", expected_hashes=None)
        for layers in ((0, 2), (2, config.num_layers))
    ]


def orders(rng, count):
    """Prompts that begin alike, tokens wanted, and after how many of them the client leaves."""
    stems = [[rng.randrange(250) for _ in range(size)] for size in (18, 38, 41, 70)]
    for _ in range(count):
        stem = rng.choice(stems)
        prompt = stem[: rng.randint(1, len(stem))] + [rng.randrange(250)] * rng.randint(0, 12)
        yield tuple(prompt), rng.choice([1, 3, 12, 50]), rng.choice([None, None, 1, 5])


async def texts(shards, options, num_slots, asked, width):
    """What each order's text and logits are, `width` of them at once; and how many were reused."""
    limits = Limits(num_slots, 4096, chunk_tokens=16, num_stages=2, window=WINDOW)
    cores = [StageCore(shard, limits.for_session(make_codec("F32", 64))) for shard in shards]
    engine = PipelineEngine(limits, None, options)
    engine.allow_reuse(True)
    found = [None] * len(asked)

    async def ask(index, prompt, max_tokens, most):
        rows = []

        def note(token_ids, logits):
            rows.append(np.array(logits))
            return logits

        generation = Generation(
            prompt, max_tokens, frozenset(), SamplingParams(), (note,), salt=b"mine"
        )
        token_ids = []
        async with engine.generate(generation) as stream:
            async for output in stream:
                token_ids.append(output.token_id)
                if len(token_ids) == most:
                    break
        found[index] = token_ids, np.stack(rows[: len(token_ids)])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run, Yielding(LocalPipeline(cores)))
        for begin in range(0, len(asked), width):
            async with trio.open_nursery() as clients:
                for index in range(begin, min(begin + width, len(asked))):
                    clients.start_soon(ask, index, *asked[index])
        nursery.cancel_scope.cancel()
    return found, engine.stats.num_prefix_hits


@pytest.mark.parametrize(("num_slots", "seed"), [(1, 1001), (5, 4005)])
@pytest.mark.parametrize("share", [0.3, 1.0])
async def test_what_is_reused_under_a_window_changes_no_logit(shards, num_slots, seed, share):
    asked = list(orders(random.Random(seed), 40))
    cold, num_cold = await texts(shards, NO_PREFIXES, num_slots, asked, 1)
    warm, num_hits = await texts(shards, PrefixOptions(share, 600.0), num_slots, asked, 5)
    assert num_cold == 0
    assert num_hits > 0
    for one, other in zip(cold, warm, strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])
