"""A recorded decode step gives the bits of the calls one by one, whoever decodes in it."""

import gc
import random
import weakref

import numpy as np
import pytest
import torch

from pipeline.errors import MessageError
from pipeline.kernels.runtime import set_num_threads
from pipeline.protocol.batch import Segment

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
# tied and untied heads, learned and rotary positions, biases, a window
FAMILIES = ("gpt2", "llama-untied-gqa", "llama-tied-llama3-rope", "mistral-sliding-window")
SLOTS = 16


@pytest.fixture(params=FAMILIES)
def exact(request, make_oracle, native):
    return make_oracle(request.param).computing_with(native)


def run_recorded(pipeline, token_ids, batch):
    """Hidden rows between the stages, then greedy tokens and logits, from the wire to the wire."""
    rows, between = memoryview(token_ids.to(torch.int32).numpy()).cast("B"), []
    for shard, cache in zip(pipeline.shards, pipeline.caches, strict=True):
        rows, logits = shard.decode(rows, batch, cache)
        between.append(torch.frombuffer(rows, dtype=torch.int32))
    return between, torch.from_numpy(logits)


def run_one_by_one(pipeline, token_ids, batch):
    rows, between = token_ids.numpy(), []
    for shard, cache in zip(pipeline.shards, pipeline.caches, strict=True):
        rows = shard.forward(rows, batch, cache)
        between.append(torch.from_numpy(rows).view(torch.int32).flatten())
    logits = torch.from_numpy(pipeline.shards[-1].logits(rows))
    between[-1] = logits.argmax(-1).to(torch.int32)
    return between, logits


def batches(num_steps):
    """Decode steps of up to 16 slots that join and leave in any order, each with what joins."""
    order, positions, live = random.Random(5), [0] * SLOTS, []
    sizes = [1, 2, 16, 3, 16, 1, 7]
    for index in range(num_steps):
        size = sizes[index % len(sizes)]
        waiting = sorted(set(range(SLOTS)) - set(live))
        live += order.sample(waiting, max(0, size - len(live)))
        live = order.sample(live, size)
        fresh = [Segment(slot, 0, 2 + slot) for slot in live if positions[slot] == 0]
        for slot, _, num_tokens in fresh:
            positions[slot] = num_tokens
        yield fresh, [Segment(slot, positions[slot], 1) for slot in live]
        for slot in live:
            positions[slot] += 1


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("bounds", [(), (1, 3)], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_recorded_steps_equal_the_calls_one_by_one(
    exact, make_pipeline, dtype, bounds, num_threads
):
    shards = exact.split(*bounds, dtype=dtype)
    recorded, plain = (make_pipeline(shards, num_slots=SLOTS) for _ in range(2))
    generator = torch.Generator().manual_seed(6)
    try:
        set_num_threads(num_threads)
        for fresh, batch in batches(14):
            if fresh:
                count = sum(segment.num_tokens for segment in fresh)
                prompt = torch.randint(3, exact.config.vocab_size, (count,), generator=generator)
                for pipeline in (recorded, plain):
                    pipeline.hidden(prompt, fresh)
            ids = torch.randint(3, exact.config.vocab_size, (len(batch),), generator=generator)
            found, logits = run_recorded(recorded, ids, batch)
            expected, expected_logits = run_one_by_one(plain, ids, batch)
            assert all(map(torch.equal, found, expected))
            assert logits.equal(expected_logits)
    finally:
        set_num_threads(1)
    for cache, other in zip(recorded.caches, plain.caches, strict=True):
        assert cache.recordings.keys() == {1, 2, 3, 7, 16}
        assert not other.recordings.keys()
        assert all(map(np.array_equal, cache.keys + cache.values, other.keys + other.values))


@pytest.fixture
def pipeline(make_oracle, native, make_pipeline):
    return make_pipeline(make_oracle("gpt2").computing_with(native).split(2), num_slots=2)


def decode(pipeline, *positions):
    batch = [Segment(slot, position, 1) for slot, position in enumerate(positions)]
    return run_recorded(pipeline, torch.arange(3, 3 + len(batch)), batch)


def test_rows_are_the_callers_own(pipeline):
    first, _ = decode(pipeline, 0)
    expected = [rows.clone() for rows in first]
    decode(pipeline, 1)
    assert all(map(torch.equal, first, expected))


def test_a_step_after_a_rewind_sees_what_is_left(pipeline):
    for position in range(4):
        last = decode(pipeline, position, position)[1].clone()
    for cache in pipeline.caches:
        cache.truncate(0, 2)
        cache.truncate(1, 3)
    decode(pipeline, 2)
    assert decode(pipeline, 3, 3)[1].equal(last)


def test_a_released_cache_takes_its_steps_along(pipeline):
    decode(pipeline, 0)
    cache = pipeline.caches[1]
    step = cache.recordings[1]
    kept = [weakref.ref(each) for each in (step, cache.keys[0], cache.values[1])]
    del step
    cache.release()
    assert [each() for each in kept] == [None] * 3


def test_a_forgotten_cache_needs_no_garbage_collector(pipeline):
    decode(pipeline, 0)
    keys = weakref.ref(pipeline.caches[1].keys[0])
    gc.disable()
    try:
        pipeline.caches.clear()
        assert keys() is None
    finally:
        gc.enable()


def test_steps_of_more_requests_leave_those_of_fewer_intact(pipeline):
    """They share what lies between the layers, and that grows."""
    _, logits = decode(pipeline, 0)
    expected = logits.clone()
    decode(pipeline, 1, 0)
    for cache in pipeline.caches:
        cache.clear()
    assert decode(pipeline, 0)[1].equal(expected)


@pytest.mark.parametrize(
    ("rows", "batch", "error"),
    [
        (b"\x65\0\0\0", [Segment(0, 1, 1)], (ValueError, "no such row: 101")),
        (b"\xff\xff\xff\xff", [Segment(0, 1, 1)], (ValueError, "no such row: 4294967295")),
        (b"\0\0\0", [Segment(0, 1, 1)], (ValueError, "bytes of rows: 3")),
        (b"\0\0\0\0", [Segment(0, 2, 1)], (MessageError, "slot 0 holds 1 tokens")),
    ],
)
def test_what_does_not_fit_is_refused_and_not_counted(pipeline, rows, batch, error):
    decode(pipeline, 0)
    kind, message = error
    with pytest.raises(kind, match=message):
        pipeline.shards[0].decode(rows, batch, pipeline.caches[0])
    assert pipeline.caches[0].lengths == (1, 0)
    decode(pipeline, 1)
