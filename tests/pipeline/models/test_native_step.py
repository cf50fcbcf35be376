"""A recorded decode step gives the bits of the calls one by one, whoever decodes in it."""

import gc
import random
import weakref

import pytest
import torch

from pipeline.models.batch import Segment
from pipeline.models.kernels import Kernels
from pipeline.models.runtime import set_num_threads

PRECISIONS = ("float32", "bfloat16", "int8")
# tied and untied heads, learned and rotary positions, biases, a window
FAMILIES = ("gpt2", "llama-untied-gqa", "llama-tied-llama3-rope", "mistral-sliding-window")
SLOTS = 16


@pytest.fixture(params=FAMILIES)
def exact(request, make_oracle, native):
    return make_oracle(request.param).computing_with(native)


def one_by_one(shards):
    """The same shards without recording."""
    for shard in shards:
        run = Kernels.run.__get__(shard.kernels)
        shard.kernels.run = run
    return shards


def steps(vocab_size, count):
    """Prefills and decode steps of up to 16 slots that join and leave in any order."""
    order, generator = random.Random(5), torch.Generator().manual_seed(6)
    positions, live = [0] * SLOTS, []
    sizes = [1, 2, 16, 3, 16, 1, 7]
    for index in range(count):
        wanted = sizes[index % len(sizes)]
        joining = order.sample(sorted(set(range(SLOTS)) - set(live)), max(0, wanted - len(live)))
        live = order.sample(live + joining, wanted)
        fresh = [slot for slot in live if positions[slot] == 0]
        for batch in ([Segment(slot, 0, 2 + slot) for slot in fresh], None):
            batch = [Segment(slot, positions[slot], 1) for slot in live] if batch is None else batch
            for slot, _, num_tokens in map(as_tuple, batch):
                positions[slot] += num_tokens
            num_rows = sum(segment.num_tokens for segment in batch)
            if batch:
                yield batch, torch.randint(3, vocab_size, (num_rows,), generator=generator)


def as_tuple(segment):
    return segment.slot, segment.position, segment.num_tokens


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("bounds", [(), (1, 3)], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_recorded_steps_equal_the_calls_one_by_one(
    exact, make_pipeline, dtype, bounds, num_threads
):
    recorded = make_pipeline(exact.split(*bounds, dtype=dtype), num_slots=SLOTS)
    plain = make_pipeline(one_by_one(exact.split(*bounds, dtype=dtype)), num_slots=SLOTS)
    try:
        set_num_threads(num_threads)
        for batch, token_ids in steps(exact.config.vocab_size, 14):
            found = recorded.logits(token_ids, batch)
            assert found.equal(plain.logits(token_ids, batch))
    finally:
        set_num_threads(1)
    for cache, untouched in zip(recorded.caches, plain.caches, strict=True):
        assert set(cache.recorded) == {1, 2, 3, 7, 16}
        assert untouched.recorded is None
        for name in ("keys", "values"):
            pairs = zip(getattr(cache, name), getattr(untouched, name), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def pipeline(make_oracle, native, make_pipeline):
    return make_pipeline(make_oracle("gpt2").computing_with(native).split(2), num_slots=2)


def decode(pipeline, *positions):
    batch = [Segment(slot, position, 1) for slot, position in enumerate(positions)]
    return pipeline.hidden(torch.arange(3, 3 + len(batch)), batch)


def test_results_are_the_callers_own(pipeline):
    first = decode(pipeline, 0)
    expected = first.clone()
    decode(pipeline, 1)
    assert first.equal(expected)


def test_a_step_after_a_rewind_sees_what_is_left(pipeline):
    for position in range(4):
        last = decode(pipeline, position, position)
    for cache in pipeline.caches:
        cache.truncate(0, 2)
        cache.truncate(1, 3)
    decode(pipeline, 2)
    assert decode(pipeline, 3, 3).equal(last)


def test_a_released_cache_takes_its_steps_along(pipeline):
    decode(pipeline, 0)
    cache = pipeline.caches[1]
    (step,) = cache.recorded.values()
    kept = [weakref.ref(step), weakref.ref(cache.keys[0]), weakref.ref(cache.values[1])]
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


def test_a_token_that_does_not_exist_is_refused_and_not_counted(pipeline):
    decode(pipeline, 0)
    with pytest.raises(ValueError, match="no such row: 101"):
        pipeline.hidden(torch.tensor([101]), [Segment(0, 1, 1)])
    assert pipeline.caches[0].lengths == (1, 0)
