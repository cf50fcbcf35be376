"""With native kernels a row's result depends on its own request alone, bit for bit."""

import random

import numpy as np
import pytest
import torch

from pipeline.kernels.runtime import set_num_threads
from pipeline.protocol.batch import Segment

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
NUM_REQUESTS = 16
NUM_TOKENS = 5


@pytest.fixture(params=["gpt2", "llama-untied-gqa", "mistral-sliding-window"])
def exact(request, make_oracle, native):
    return make_oracle(request.param).computing_with(native)


@pytest.fixture(params=PRECISIONS)
def dtype(request):
    return request.param


def prompts(vocab_size):
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 20, 23, 31, 32, 33, 40]
    return [torch.randint(3, vocab_size, (each,), generator=generator) for each in lengths]


def test_requests_that_join_and_leave_equal_each_alone(exact, make_pipeline, dtype):
    """Batches of 1 to 16, prefill beside decode, lengths mixed."""
    shards = exact.split(dtype=dtype)
    queue = prompts(exact.config.vocab_size)
    alone = [make_pipeline(shards).greedy(prompt, NUM_TOKENS) for prompt in queue]
    pipeline = make_pipeline(shards, num_slots=NUM_REQUESTS)
    order = random.Random(4)
    rows = dict(enumerate(queue))
    positions, found, live = [0] * NUM_REQUESTS, [[] for _ in queue], []
    widths = set()
    while rows:
        waiting = sorted(rows.keys() - set(live))
        live += waiting[: order.randrange(1, 4) if live else 1]
        order.shuffle(live)
        widths.add(len(live))
        batch = [Segment(slot, positions[slot], len(rows[slot])) for slot in live]
        ends = torch.tensor([len(rows[slot]) for slot in live]).cumsum(0) - 1
        logits = pipeline.logits(torch.cat([rows[slot] for slot in live]), batch)[ends]
        for slot, row in zip(list(live), logits, strict=True):
            positions[slot] += len(rows[slot])
            found[slot].append(row)
            rows[slot] = row.argmax().unsqueeze(0)
            if len(found[slot]) == NUM_TOKENS:
                del rows[slot]
                live.remove(slot)
    for rows_found, (_, expected) in zip(found, alone, strict=True):
        assert torch.equal(torch.stack(rows_found), expected)
    assert len(widths) > 4


@pytest.mark.parametrize("count", [2, 3, 15, 16])
def test_a_batch_of_any_size_equals_each_alone(exact, make_pipeline, dtype, count):
    shards = exact.split(dtype=dtype)
    chosen = prompts(exact.config.vocab_size)[-count:]
    pipeline = make_pipeline(shards, num_slots=count)
    batch = [Segment(slot, 0, len(prompt)) for slot, prompt in enumerate(chosen)]
    together = pipeline.logits(torch.cat(chosen), batch)
    expected = [make_pipeline(shards).logits(each, [Segment(0, 0, len(each))]) for each in chosen]
    assert torch.equal(together, torch.cat(expected))


def test_rows_may_pass_through_mlps_in_blocks_of_any_size(
    exact, make_pipeline, dtype, token_ids, monkeypatch
):
    shards, batch = exact.split(dtype=dtype), [Segment(0, 0, len(token_ids))]
    expected = make_pipeline(shards).logits(token_ids, batch)
    for block_rows in (1, 2, len(token_ids) - 1):
        monkeypatch.setattr(type(shards[0].kernels), "block_rows", block_rows)
        assert torch.equal(make_pipeline(shards).logits(token_ids, batch), expected)


def test_a_long_prompt_leaves_no_room_for_all_its_rows_in_an_mlp(exact, monkeypatch):
    (shard,) = exact.split()
    monkeypatch.setattr(type(shard.kernels), "block_rows", 4)
    shard.forward(np.zeros(128, np.int64), [Segment(0, 0, 128)], shard.new_cache(1, 128))
    width, inner = exact.config.hidden_dim, exact.config.intermediate_size
    room = sum(each.size for each in shard._room._buffers)
    assert room < 128 * (width + exact.config.shape(0).heads.qkv_width + inner)


def test_a_prefill_in_any_chunks_equals_token_by_token(exact, make_pipeline, dtype, token_ids):
    shards = exact.split(dtype=dtype)
    length, expected = len(token_ids), None
    for chunk in (1, length, 2, 7, 16):
        pipeline, rows = make_pipeline(shards), []
        for start in range(0, length, chunk):
            piece = token_ids[start : start + chunk]
            rows.append(pipeline.logits(piece, [Segment(0, start, len(piece))]))
        logits = torch.cat(rows)
        expected = logits if expected is None else expected
        assert torch.equal(logits, expected), chunk


def test_the_number_of_threads_changes_nothing(exact, make_pipeline, dtype, token_ids):
    shards, found = exact.split(dtype=dtype), []
    try:
        for num_threads in (1, 2):
            set_num_threads(num_threads)
            found.append(make_pipeline(shards).greedy(token_ids, 8)[1])
    finally:
        set_num_threads(1)
    assert torch.equal(*found)


def test_a_slot_used_before_gives_the_same_bits(exact, make_pipeline, dtype, token_ids):
    pipeline = make_pipeline(exact.split(dtype=dtype))
    expected = pipeline.greedy(token_ids, 4)[1]
    cache = pipeline.caches[0]
    cache.truncate(0, 9)
    rows = [
        pipeline.logits(token_ids[at : at + 1], [Segment(0, at, 1)])
        for at in range(9, len(token_ids))
    ]
    assert torch.equal(rows[-1][0], expected[0])
