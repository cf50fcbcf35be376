"""Logits of requests that go on from what others have left: a cold run's, bit for bit."""

import itertools
import random
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio

from pipeline.codecs.privacy_budget import PrivacyBudget
from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.errors import RequestFailed, SessionError
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.protocol.step_header import StepKind
from pipeline.protocol.step_limits import token_ids_to_wire
from pipeline.sampling.params import SamplingParams
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.step_executor import StageCore
from tests.pipeline.engine.engines import Yielding

LIMITS = Limits(num_slots=4, max_seq_len=128, chunk_tokens=16, num_stages=2)
KEEPS = PrefixOptions(1.0, 600.0)
SALT = b"mine"


@pytest.fixture(scope="module")
def load(tiny_model):
    """Shards of so many stages, for native kernels."""
    if why := why_not_native():
        pytest.skip(f"no native kernels: {why}")
    config = load_config(tiny_model)

    def load(num_stages):
        bounds = [0, *range(1, num_stages), config.num_layers]
        return [
            load_shard(tiny_model, config, *layers, kernels="native", expected_hashes=None)
            for layers in itertools.pairwise(bounds)
        ]

    return load


def new_cores(shards):
    limits = LIMITS.for_session(make_codec("F32", 64))
    logs = [ActivationLog(LIMITS.num_slots, LIMITS.max_seq_len, 64) for _ in shards[1:]]
    return [
        StageCore(*each) for each in zip(shards, [limits] * len(shards), [*logs, None], strict=True)
    ]


class Watched(Yielding):
    """Notes what kinds of steps there were, and fails after so many results."""

    def __init__(self, local, num_results=1 << 30):
        super().__init__(local)
        self.kinds = []
        self.num_left = num_results

    async def send(self, step):
        self.kinds.append(step.header.kind)
        await super().send(step)

    async def receive(self):
        self.num_left -= 1
        if self.num_left < 0:
            raise SessionError("a stage is lost")
        return await super().receive()


class Running:
    """An engine over stages in this process; what its requests got."""

    def __init__(self, engine, cores, pipeline):
        self.engine, self.cores, self.pipeline = engine, cores, pipeline

    async def ask(self, prompt_ids, max_tokens=8, salt=SALT, delay=0):
        """A continuation: its tokens, the logits of each, and how many tokens were not computed."""
        rows = []

        def note(token_ids, logits):
            rows.append(np.array(logits))
            return logits

        generation = Generation(
            tuple(prompt_ids), max_tokens, frozenset(), SamplingParams(), (note,), salt=salt
        )
        for _ in range(delay):
            await trio.lowlevel.checkpoint()
        async with self.engine.generate(generation) as stream:
            outputs = [output async for output in stream]
        return [each.token_id for each in outputs], np.stack(rows), outputs[0].num_cached


@asynccontextmanager
async def running(shards, options=KEEPS, *, is_row_exact=True, budget=None):
    cores = new_cores(shards)
    engine = PipelineEngine(LIMITS, budget, options)
    engine.allow_reuse(is_row_exact)
    pipeline = Watched(LocalPipeline(cores))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run, pipeline)
        yield Running(engine, cores, pipeline)
        nursery.cancel_scope.cancel()


async def cold(shards, prompt_ids, max_tokens=8):
    async with running(shards, PrefixOptions()) as alone:
        return await alone.ask(prompt_ids, max_tokens)


def assert_same(found, expected, cached):
    assert found[0] == expected[0]
    assert found[1].tobytes() == expected[1].tobytes()
    assert (found[2], expected[2]) == (cached, 0)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_a_second_turn_is_that_of_a_cold_run_bit_for_bit(load, num_stages):
    shards = load(num_stages)
    first = tuple(range(70))
    async with running(shards) as warm:
        said, _, cached = await warm.ask(first)
        assert cached == 0
        second = (*first, *said, 9, 9, 9)
        found = await warm.ask(second)
        assert warm.pipeline.kinds.count(StepKind.TRUNCATE) == 0
    assert_same(found, await cold(shards, second), 77)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_a_copy_from_a_slot_that_decodes_disturbs_neither(load, num_stages):
    shards = load(num_stages)
    text = tuple(range(100, 160))
    async with running(shards) as warm:
        found = {}

        async def ask(index, prompt_ids, max_tokens, delay):
            found[index] = await warm.ask(prompt_ids, max_tokens, delay=delay)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 0, text, 40, 0)
            nursery.start_soon(ask, 1, (*text[:50], 7, 7), 12, 60)  # the other is writing by then
            nursery.start_soon(ask, 2, (*text[:33], 1), 12, 75)
            nursery.start_soon(ask, 3, (5,) * 20, 12, 75)
        assert warm.pipeline.kinds.count(StepKind.COPY) == 2
    assert_same(found[0], await cold(shards, text, 40), 0)
    assert_same(found[1], await cold(shards, (*text[:50], 7, 7), 12), 50)
    assert_same(found[2], await cold(shards, (*text[:33], 1), 12), 33)
    assert_same(found[3], await cold(shards, (5,) * 20, 12), 0)


async def test_whatever_is_asked_side_by_side_is_what_each_gets_from_cold_stages(load):
    shards, rng = load(2), random.Random(5)
    texts = [tuple(rng.randrange(255) for _ in range(40))]
    for _ in range(24):
        text = rng.choice(texts)
        begin = text[: rng.randint(10, len(text))]
        texts.append((*begin, *[rng.randrange(255) for _ in range(rng.randint(1, 25))])[:100])
    found = {}
    async with running(shards) as warm:

        async def ask(index):
            found[index] = await warm.ask(texts[index], 6, delay=rng.randint(0, 80))

        for first in range(0, len(texts), 5):  # who meets whose slot is the event loop's choice
            batch = range(first, first + 5)
            async with trio.open_nursery() as nursery:
                for index in batch:
                    nursery.start_soon(ask, index)
        stats = warm.engine.stats
    for index, text in enumerate(texts):
        assert_same(found[index], await cold(shards, text, 6), found[index][2])
    assert stats.num_prefix_hits == sum(each[2] > 0 for each in found.values()) > 3
    assert stats.num_cached_tokens == sum(each[2] for each in found.values())


def mended(scheduler, cores, shards, lost):
    """New cores in the place of `lost` ones, with their KV state rebuilt, as after a failover."""
    fresh = new_cores(shards)
    lengths = scheduler.rewind()
    after = [fresh[i] if i in lost else core for i, core in enumerate(cores)]
    for i, core in enumerate(after):
        if i not in lost:
            core.rewind(lengths)
    for i in sorted(lost):
        if i - 1 in lost:
            continue
        until = max(j for j in lost if set(range(i, j + 1)) <= lost)
        steps = after[i - 1].replay(until) if i else (
            (step.header, (token_ids_to_wire(step.token_ids),)) for step in scheduler.replay(until)
        )  # fmt: skip
        for header, tensors in steps:
            for core in after[i : until + 1]:
                tensors = core.step(header, tensors)
    for core in after:
        assert list(core.cache.lengths) == lengths
    return after


@pytest.mark.parametrize("lost", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 1, 2}], ids=str)
async def test_a_stage_lost_under_requests_on_reused_prefixes_changes_nothing(load, lost):
    """In the slot of before, and in a copy; what idled is dropped."""
    shards = load(3)
    text = tuple(range(60))
    engine, found, num_idle, watched = PipelineEngine(LIMITS, None, KEEPS), {}, [], []
    engine.allow_reuse(is_row_exact=True)

    async def run():
        cores = new_cores(shards)
        pipeline = Watched(LocalPipeline(cores))
        watched.append(pipeline)
        while True:
            try:
                await engine.run(pipeline)
            except SessionError:
                cores = mended(engine.scheduler, cores, shards, lost)
                num_idle.append(engine.stats.num_idle_prefixes)
                pipeline = Watched(LocalPipeline(cores), 7)

    user = Running(engine, None, None)

    async def ask(index, prompt_ids):
        found[index] = await user.ask(prompt_ids, 40, delay=5 * index)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        said, _, _ = await user.ask(text)
        await user.ask((200,) * 30)  # to idle
        turns = [(*text, *said, 9), (*text[:40], 8)]
        async with trio.open_nursery() as clients:
            for index, turn in enumerate(turns):
                clients.start_soon(ask, index, turn)
            for _ in range(40):
                await trio.lowlevel.checkpoint()
            assert engine.stats.num_prefix_hits == 2
            assert engine.stats.num_idle_prefixes == 1
            watched[0].num_left = 0
        nursery.cancel_scope.cancel()
    assert num_idle[0] == 0
    for index, (turn, cached) in enumerate(zip(turns, (67, 40), strict=True)):
        assert_same(found[index], await cold(shards, turn, 40), cached)
    assert len(num_idle) > 2


async def test_an_idle_engine_wakes_to_clear_what_has_expired(load, autojump_clock):
    async with running(load(2), PrefixOptions(1.0, 30.0)) as warm:
        await warm.ask(range(20))
        assert warm.engine.stats.num_idle_prefixes == 1
        await trio.sleep(29)
        assert [max(core.cache.lengths) for core in warm.cores] == [27, 27]
        await trio.sleep(2)
        for core in warm.cores:
            assert not any(core.cache.lengths)
            assert not any(each.any() for each in (*core.cache.keys, *core.cache.values))
            assert core.log is None or not core.log._rows.any()
        assert warm.engine.stats.num_idle_prefixes == 0
        assert (await warm.ask(range(20)))[2] == 0


@pytest.mark.parametrize(
    ("changes", "salt"),
    [
        ({"is_row_exact": False}, SALT),
        ({"options": PrefixOptions(0.0)}, SALT),
        ({"budget": PrivacyBudget(10.0, 1.0, 1e6, 1e-5)}, SALT),
        ({}, None),
    ],
    ids=["rows are not exact", "a share of nothing", "rows are noisy", "no salt"],
)
async def test_nothing_is_left_where_nothing_may_be_reused(load, changes, salt):
    async with running(load(2), **changes) as warm:
        await warm.ask(range(20), salt=salt)
        assert (await warm.ask(range(20), salt=salt))[2] == 0
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert not any(any(core.cache.lengths) for core in warm.cores)


async def test_what_a_failed_request_leaves_is_not_gone_on_from(load):
    async with running(load(2)) as warm:

        def fail(token_ids, logits):
            raise ZeroDivisionError

        doomed = Generation(tuple(range(20)), 5, frozenset(), SamplingParams(), (fail,), salt=SALT)
        async with warm.engine.generate(doomed) as stream:
            with pytest.raises(RequestFailed):
                await stream.receive()
        assert (await warm.ask(range(20)))[2] == 0


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_who_has_had_enough_leaves_it_to_others_and_who_is_cut_off_leaves_nothing(
    load, is_cancelled
):
    generation = Generation(tuple(range(30)), 50, frozenset(), SamplingParams(), salt=SALT)
    async with running(load(2)) as warm:
        with trio.CancelScope() as scope:
            async with warm.engine.generate(generation) as stream:
                for _ in range(5):
                    await stream.receive()
                if is_cancelled:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
        assert (await warm.ask((*range(30), 7)))[2] == (0 if is_cancelled else 30)
