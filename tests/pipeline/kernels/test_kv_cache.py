"""A step must continue exactly what its slot holds, and clearing leaves nothing behind."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.dtypes import FLOAT16, FLOAT32
from pipeline.errors import MessageError
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.kv_storage import LayerKV
from pipeline.protocol.batch import Segment


@pytest.fixture(params=[FLOAT32, FLOAT16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def cache(make_cache, dtype):
    return make_cache(num_layers=2, num_slots=3, num_kv_heads=2, head_dim=4, dtype=dtype)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(cache: KVCache, *batch: Segment) -> None:
    cache.reserve(batch)
    for tensor in (*cache.keys, *cache.values):
        for segment in batch:
            end = segment.position + segment.num_tokens
            tensor[segment.slot, :, segment.position : end] = 7.0
    cache.advance(batch)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ([Segment(1, 4, 1)], "slot 1 holds 5 tokens, but the step is at 4"),
        ([Segment(1, 6, 1)], "slot 1 holds 5 tokens, but the step is at 6"),
        ([Segment(1, 0, 5)], "slot 1 holds 5 tokens, but the step is at 0"),
        ([Segment(1, 5, 12)], "12 more at position 5 exceed the context of 16"),
        ([Segment(0, 0, 17)], "17 more at position 0 exceed the context of 16"),
        ([Segment(3, 0, 1)], "slot 3 does not exist: there are 3"),
        ([Segment(-1, 0, 1)], "slot -1 does not exist"),
        ([Segment(0, 0, 0)], "a segment of 0 tokens"),
        ([Segment(0, 0, 2), Segment(0, 2, 1)], "slot 0 appears twice"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(cache, batch, told):
    fill(cache, Segment(1, 0, 5))
    with pytest.raises(MessageError, match=told):
        cache.reserve(batch)
    assert cache.lengths == (0, 5, 0)


def test_the_context_can_be_filled_to_its_last_position(cache):
    fill(cache, Segment(0, 0, 15))
    fill(cache, Segment(0, 15, 1))
    assert cache.lengths == (16, 0, 0)


def test_clearing_a_slot_zeroes_it_and_leaves_the_others(cache):
    fill(cache, Segment(0, 0, 3), Segment(2, 0, 16))
    cache.clear([2])
    assert cache.lengths == (3, 0, 0)
    for tensor in (*cache.keys, *cache.values):
        assert not tensor[2].any()
        assert (tensor[0, :, :3] == 7.0).all()


def test_clearing_reaches_what_a_failed_step_wrote(cache):
    fill(cache, Segment(0, 0, 3))
    cache.reserve([Segment(0, 3, 9)])
    cache.keys[0][0, :, 3:12] = 9.0  # the first layer was computed, then the step failed
    cache.clear()
    assert cache.lengths == (0, 0, 0)
    assert not cache.keys[0][0, :, :12].any()


def test_a_truncated_slot_keeps_its_beginning_and_nothing_behind_it(cache):
    fill(cache, Segment(0, 0, 9), Segment(2, 0, 9))
    cache.reserve([Segment(0, 9, 3)])
    cache.values[1][0, :, 9:12] = 9.0  # a step that failed half-way
    cache.truncate(0, 4)
    assert cache.lengths == (4, 0, 9)
    for tensor in (*cache.keys, *cache.values):
        assert (tensor[0, :, :4] == 7.0).all()
        assert not tensor[0, :, 4:12].any()
        assert (tensor[2, :, :9] == 7.0).all()
    cache.reserve([Segment(0, 4, 1)])


@pytest.mark.parametrize("length", [0, 3, 4, 5, 8])
def test_in_blocks_a_truncated_slot_keeps_its_beginning_alone_too(make_cache, length, dtype):
    cache = make_cache(
        num_slots=2, num_kv_heads=3, max_seq_len=14, head_dim=2, dtype=dtype, key_block=4
    )
    batch = [Segment(0, 0, 9), Segment(1, 0, 9)]
    cache.reserve(batch)
    for memory in (cache.keys[0], cache.values[0]):
        memory[:, :3] = 7.0  # 12 positions: of the last block some are unused
    cache.advance(batch)
    cache.truncate(0, length)
    for memory, order in ((cache.keys[0], (0, 2, 1, 4, 3)), (cache.values[0], (0, 2, 1, 3, 4))):
        by_position = memory.transpose(order).reshape(2, 3, 16, 2)
        assert (by_position[0, :, :length] == 7.0).all()
        assert not by_position[0, :, length:].any()
        assert (by_position[1, :, :9] == 7.0).all()


@pytest.mark.parametrize("key_block", [1, 4])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_a_copy_is_the_beginning_of_its_source_and_nothing_behind_it(
    make_cache, length, dtype, key_block
):
    cache = make_cache(
        num_layers=2, num_slots=3, num_kv_heads=3, max_seq_len=14, head_dim=2,
        dtype=dtype, key_block=key_block,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    cache.reserve([Segment(2, 0, 9)])
    for memory in (*cache.keys, *cache.values):
        # Of the last block also what is unused; nothing is 0.
        memory[2] = 1 + rng.random(memory.shape[1:])
    cache.advance([Segment(2, 0, 9)])
    cache.copy(2, 0, length)
    assert cache.lengths == (length, 0, 9)
    for found, expected in zip(
        cache.export(0, range(length)), cache.export(2, range(length)), strict=True
    ):
        assert (found.keys == expected.keys).all()
        assert (found.values == expected.values).all()
    for memory in (*cache.keys, *cache.values):
        assert np.count_nonzero(memory[0]) == 3 * length * 2
        assert not memory[1].any()
    cache.truncate(0, 0)
    for memory in (*cache.keys, *cache.values):
        assert not memory[:2].any()


@pytest.mark.parametrize(
    ("source", "target", "length", "told"),
    [
        (0, 1, 6, "slot 0 holds 5 tokens, not the positions 0 to 6"),
        (0, 2, 3, "slot 2 holds 2 tokens, but the step is at 0"),
        (0, 0, 3, "slot 0 holds 5 tokens, but the step is at 0"),
        (3, 1, 1, "slot 3 does not exist"),
        (0, 3, 1, "slot 3 does not exist"),
    ],
)
def test_a_copy_that_cannot_be_is_refused_and_changes_nothing(cache, source, target, length, told):
    fill(cache, Segment(0, 0, 5), Segment(2, 0, 2))
    with pytest.raises(MessageError, match=told):
        cache.copy(source, target, length)
    assert cache.lengths == (5, 0, 2)


@pytest.mark.parametrize(("slot", "length"), [(0, 6), (0, -1), (1, 1), (3, 0), (-1, 0)])
def test_a_slot_cannot_be_cut_to_what_it_does_not_hold(cache, slot, length):
    fill(cache, Segment(0, 0, 5))
    with pytest.raises(MessageError, match=f"slot {slot} (holds|does not exist)"):
        cache.truncate(slot, length)
    assert cache.lengths == (5, 0, 0)


def test_generation_after_a_truncation_is_as_if_nothing_else_had_been_seen(
    oracle, make_pipeline, token_ids
):
    pipeline = make_pipeline(oracle.split(2))
    expected = pipeline.greedy(token_ids, 3)[1]
    for cache in pipeline.caches:
        cache.truncate(0, len(token_ids) - 1)
    again = pipeline.logits(token_ids[-1:], [Segment(0, len(token_ids) - 1, 1)])
    assert (again[0] - expected[0]).abs().max() <= 1e-5


def test_bytes_count_keys_and_values_of_every_layer(cache, dtype):
    assert cache.num_bytes == 2 * 2 * 3 * 2 * 16 * 4 * dtype.itemsize


@pytest.mark.parametrize(("precision", "itemsize"), [("float32", 4), ("bfloat16", 2), ("int8", 2)])
def test_what_is_planned_is_what_is_reserved(make_oracle, kernels, precision, itemsize):
    """The same memory whatever computes: plans are made where nobody knows."""
    (shard,) = make_oracle("llama-untied-gqa").computing_with(kernels).split(dtype=precision)
    cache = shard.new_cache(3, 64)
    assert cache.num_bytes == shard.kv_bytes(3, 64) == 4 * 2 * 3 * 64 * 2 * 16 * itemsize
    assert {each.itemsize for each in (*cache.keys, *cache.values)} == {itemsize}


def test_a_shard_refuses_a_step_with_too_few_rows(make_oracle, make_pipeline, token_ids):
    pipeline = make_pipeline(make_oracle("gpt2").split())
    with pytest.raises(MessageError, match="a step of 5 tokens came with 3 rows"):
        pipeline.hidden(token_ids[:3], [Segment(0, 0, 5)])
    assert pipeline.caches[0].lengths == (0,)


LAYOUTS = [(1, 1), (1, 4), (4, 1), (4, 4), (16, 3)]


def numbered(make_cache, key_block, dtype, num_tokens=11):
    """A cache whose slot 1 holds tokens that all differ, written as a step would write them."""
    cache = make_cache(
        num_layers=2, num_slots=3, num_kv_heads=2, max_seq_len=14, head_dim=4,
        dtype=dtype, key_block=key_block,
    )  # fmt: skip
    cache.reserve([Segment(1, 0, num_tokens)])
    rows = np.arange(2 * 2 * 2 * num_tokens * 4, dtype=dtype).reshape(2, 2, 2, num_tokens, 4)
    for layer in range(2):
        for head, position, each in np.ndindex(2, num_tokens, 4):
            numbers = rows[layer, :, head, position, each]
            if key_block == 1:
                cache.keys[layer][1, head, position, each] = numbers[0]
                cache.values[layer][1, head, position, each] = numbers[1]
            else:
                block, at = divmod(position, key_block)
                cache.keys[layer][1, block, head, each, at] = numbers[0]
                cache.values[layer][1, block, head, at, each] = numbers[1]
    cache.advance([Segment(1, 0, num_tokens)])
    return cache, rows


@pytest.mark.parametrize(("own", "other"), LAYOUTS)
@pytest.mark.parametrize("cut", [1, 4, 6, 11])
def test_what_is_exported_is_the_same_whatever_the_layout(make_cache, dtype, own, other, cut):
    cache, rows = numbered(make_cache, own, dtype)
    parts = [cache.export(1, range(cut)), cache.export(1, range(cut, 11))]
    for first, part in zip((0, cut), parts, strict=True):
        assert sum(array.nbytes for layer in part for array in layer) == cache.range_bytes(
            part[0].keys.shape[1]
        )
        for layer, expected in zip(part, rows, strict=True):
            for found, numbers in zip(layer, expected, strict=True):
                assert found.dtype == dtype
                assert (found == numbers[:, first : first + found.shape[1]]).all()
                assert not any(np.shares_memory(found, each) for each in cache.keys + cache.values)
    target = make_cache(
        num_layers=2, num_slots=2, num_kv_heads=2, max_seq_len=16, head_dim=4,
        dtype=dtype, key_block=other,
    )  # fmt: skip
    target.restore(0, 0, parts[0])
    if cut < 11:
        target.restore(0, cut, parts[1])
    assert target.lengths == (11, 0)
    for found, expected in zip(target.export(0, range(11)), rows, strict=True):
        assert (found.keys == expected[0]).all()
        assert (found.values == expected[1]).all()
    assert not any(each[1].any() for each in target.keys + target.values)
    target.clear()
    assert not any(each.any() for each in target.keys + target.values)


@pytest.mark.parametrize(
    ("slot", "positions"),
    [(1, range(12)), (1, range(-1, 3)), (0, range(1)), (3, range(1)), (1, range(0, 8, 2))],
)
def test_only_what_a_slot_holds_is_exported(make_cache, dtype, slot, positions):
    cache, _ = numbered(make_cache, 4, dtype)
    with pytest.raises(MessageError, match=f"slot {slot} (holds|does not exist)"):
        cache.export(slot, positions)


@pytest.mark.parametrize(
    ("slot", "position", "change", "told"),
    [
        (0, 1, lambda layers: layers, "slot 0 holds 0 tokens, but the step is at 1"),
        (1, 0, lambda layers: layers, "slot 1 holds 11 tokens"),
        (3, 0, lambda layers: layers, "slot 3 does not exist"),
        (1, 11, lambda layers: layers, "exceed the context of 14"),
        (0, 0, lambda layers: layers[:1], "of 1 layers, not 2"),
        (0, 0, lambda layers: [], "of 0 layers, not 2"),
        (0, 0, lambda layers: [each._replace(keys=each.keys[:1]) for each in layers], "expected"),
        (0, 0, lambda layers: [each._replace(values=each.values[..., :3]) for each in layers],
         "expected"),
        (0, 0, lambda layers: [layers[0], layers[1]._replace(keys=layers[1].keys[:, :2])],
         "expected"),
        (0, 0, lambda layers: [each._replace(keys=each.keys.astype("<f8")) for each in layers],
         "float64"),
        (0, 0, lambda layers: [LayerKV(*(a[:, :0] for a in each)) for each in layers], "no keys"),
        (0, 0, lambda layers: [LayerKV(*(a[0, 0] for a in each)) for each in layers], "expected"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_slot_is_not_restored(make_cache, dtype, slot, position, change, told):
    cache, _ = numbered(make_cache, 4, dtype)
    before = [each.copy() for each in cache.keys + cache.values]
    with pytest.raises(MessageError, match=told):
        cache.restore(slot, position, change(cache.export(1, range(5))))
    assert cache.lengths == (0, 11, 0)
    assert all(map(np.array_equal, before, cache.keys + cache.values))


@pytest.mark.parametrize(("source", "target"), [("torch", "native"), ("native", "torch")])
def test_generation_goes_on_from_what_other_kernels_have_computed(
    make_oracle, native, make_pipeline, token_ids, source, target
):
    assert native
    oracle = make_oracle("llama-untied-gqa")
    start, end = (
        make_pipeline(oracle.computing_with(kernels).split(2), num_slots=2)
        for kernels in (source, target)
    )
    expected = start.greedy(token_ids, 6)
    for theirs, own in zip(start.caches, end.caches, strict=True):
        own.restore(1, 0, theirs.export(0, range(len(token_ids))))
    tokens, rows = expected
    for at, token in enumerate(tokens[:-1]):
        found = end.logits(torch.tensor([token]), [Segment(1, len(token_ids) + at, 1)])
        assert (found[0] - rows[at + 1]).abs().max() <= 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("key_block", [1, 16])
def test_what_a_slot_has_held_goes_back_to_the_system_when_it_is_taken_back(make_cache, key_block):
    cache = make_cache(
        num_layers=2, num_slots=2, num_kv_heads=2, max_seq_len=1 << 16, head_dim=16,
        dtype=FLOAT32, key_block=key_block,
    )  # fmt: skip
    before = resident()
    cache.reserve([Segment(1, 0, 1 << 16)])
    for memory in (*cache.keys, *cache.values):
        memory[1].fill(1)
    cache.advance([Segment(1, 0, 1 << 16)])
    assert resident() - before > 30 << 20
    cache.truncate(1, 1 << 15)
    assert resident() - before < 24 << 20
    cache.truncate(1, 0)
    assert resident() - before < 8 << 20
    assert not any(memory[1].any() for memory in cache.keys)


def test_slots_hold_no_more_together_than_they_may(cache):
    cache.ledger.max_total = 20
    fill(cache, Segment(0, 0, 12))
    with pytest.raises(MessageError, match="hold 12 of at most 20 tokens in all"):
        cache.reserve([Segment(1, 0, 5), Segment(2, 0, 4)])
    with pytest.raises(MessageError, match="in all"):
        cache.copy(0, 1, 9)
    assert cache.lengths == (12, 0, 0)
    fill(cache, Segment(1, 0, 5), Segment(2, 0, 3))
    cache.truncate(0, 11)
    fill(cache, Segment(2, 3, 1))
