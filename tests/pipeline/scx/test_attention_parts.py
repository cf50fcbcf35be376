"""A model whose keys and values a stranger holds encoded says what it said, and notices lies."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.errors import InputError, MessageError, SessionError
from pipeline.models.registry import load_shard
from pipeline.protocol.batch import Segment
from pipeline.remote_parts.wire import PartRefusal, to_array, to_tensor
from pipeline.scx.attention_parts import AttentionParts, Encoding
from pipeline.scx.attention_wire import (
    Op,
    op_untrusted,
)
from pipeline.scx.attention_worker import AttentionMemory, AttentionWorker
from pipeline.scx.errors import AnswerRefused, CacheRefused

FAMILY = "llama-untied-gqa"
ENCODINGS = [
    {},
    {"noise": 1.0},
    {"num_decoys": 5},
    {"is_one_time": True},
    {"noise": 1.0, "num_decoys": 5, "is_one_time": True},
]


class Near:
    """A link to a worker in this process, which hears and says all that goes over it."""

    def __init__(self, worker):
        self.worker = worker
        self.heard = []
        self.lie = lambda op, arrays: arrays

    def ask(self, header, tensors=(), meanwhile=None):
        self.heard += [np.array(to_array(each)) for each in tensors]
        if meanwhile is not None:
            meanwhile()
        header_back, answered = self.worker.answer(header, tensors)
        arrays = self.lie(op_untrusted(header), [np.array(to_array(each)) for each in answered])
        return header_back, tuple(map(to_tensor, arrays))


def opened(parts, num_slots=1, max_rows=128, memory=None):
    """The parts in a session with a worker."""
    link = Near(AttentionWorker(AttentionMemory(memory)))
    parts.attach(link, SimpleNamespace(num_slots=num_slots, max_seq_len=max_rows))
    return link


@pytest.fixture
def home(make_oracle, kernels, make_pipeline):
    """A pipeline whose attention is elsewhere, beside that which it is like."""

    def make(family=FAMILY, num_slots=1, **encoding):
        oracle = make_oracle(family).computing_with(kernels)
        parts = AttentionParts(oracle.config, Encoding(**encoding))
        shard = load_shard(
            oracle.directory, oracle.config, 0, oracle.config.num_layers,
            kernels=kernels, parts=parts, expected_hashes=None,
        )  # fmt: skip
        plain = make_pipeline(oracle.split(), num_slots)
        pipeline = make_pipeline([shard], num_slots)
        link = opened(parts, num_slots)
        return SimpleNamespace(pipeline=pipeline, plain=plain, link=link, parts=parts)

    return make


@pytest.mark.parametrize(
    ("family", "encoding"),
    [("gpt2", {}), ("qwen2-qkv-bias", {}), *((FAMILY, encoding) for encoding in ENCODINGS)],
    ids=str,
)
def test_the_text_is_the_same(home, family, encoding, token_ids):
    at = home(family, **encoding)
    tokens, logits = at.pipeline.greedy(token_ids, 12)
    expected, expected_logits = at.plain.greedy(token_ids, 12)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() < 1e-4


def decoded(pipeline, token_ids, count):
    """Greedy tokens and logits, all but the first by steps from the wire to the wire."""
    ((shard,), (cache,)) = pipeline.shards, pipeline.caches
    tokens, logits = pipeline.greedy(token_ids, 1)
    found = list(logits)
    while len(tokens) < count:
        batch = [Segment(0, len(token_ids) + len(tokens) - 1, 1)]
        chosen, rows = shard.decode(tokens[-1].to_bytes(4, "little"), batch, cache)
        tokens.append(int.from_bytes(chosen, "little"))
        found.append(torch.from_numpy(rows[0].copy()))
    return tokens, torch.stack(found)


@pytest.mark.parametrize(
    ("family", "encoding"),
    [("gpt2", {}), ("qwen2-qkv-bias", {}), *((FAMILY, encoding) for encoding in ENCODINGS)],
    ids=str,
)
def test_a_recorded_step_asks_anew_each_time(home, family, encoding, token_ids):
    at = home(family, **encoding)
    if not at.pipeline.shards[0].decodes(1):
        pytest.skip("these kernels record no steps")
    tokens, logits = decoded(at.pipeline, token_ids, 24)
    expected, expected_logits = at.plain.greedy(token_ids, 24)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() < 1e-4
    assert len(at.pipeline.caches[0].recordings.keys()) == 1


def test_a_recorded_step_serves_whichever_slot_has_its_turn(home, token_ids):
    at = home(num_slots=3)
    (shard,), (cache,) = at.pipeline.shards, at.pipeline.caches
    if not shard.decodes(1):
        pytest.skip("these kernels record no steps")
    assert not shard.decodes(2)  # halves of a batch overlap, each with what it asks
    lengths = {2: 9, 0: 4, 1: 1}
    for slot, length in lengths.items():
        for pipeline in (at.pipeline, at.plain):
            pipeline.hidden(token_ids[:length], [Segment(slot, 0, length)])
    for step in range(6):
        slot = (2, 0, 1)[step % 3]
        batch = [Segment(slot, lengths[slot], 1)]
        token = token_ids[step : step + 1]
        expected = at.plain.logits(token, batch)
        _, rows = shard.decode(int(token).to_bytes(4, "little"), batch, cache)
        assert (torch.from_numpy(rows) - expected).abs().max() < 1e-4
        lengths[slot] += 1


def test_what_is_answered_wrongly_ends_a_recorded_step(home, token_ids):
    at = home()
    (shard,), (cache,) = at.pipeline.shards, at.pipeline.caches
    if not shard.decodes(1):
        pytest.skip("these kernels record no steps")
    decoded(at.pipeline, token_ids, 3)
    at.link.lie = lambda op, arrays: [arrays[0] * 1e6, arrays[1]]
    with pytest.raises(AnswerRefused, match="longer than any"):
        shard.decode((5).to_bytes(4, "little"), [Segment(0, 25, 1)], cache)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_a_prompt_in_chunks_says_the_same(home, token_ids, encoding):
    at = home(**encoding)
    whole = at.plain.logits(token_ids, [Segment(0, 0, 23)])
    found, first = [], 0
    for count in (9, 1, 12, 1):
        rows = token_ids[first : first + count]
        found.append(at.pipeline.logits(rows, [Segment(0, first, count)]))
        first += count
    assert (torch.cat(found) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("encoding", ENCODINGS[-1:], ids=str)
def test_batch_mates_of_unequal_lengths_do_not_meet(home, token_ids, encoding):
    at = home(num_slots=3, **encoding)
    firsts = [Segment(0, 0, 9), Segment(1, 0, 2), Segment(2, 0, 5)]
    nexts = [Segment(2, 5, 1), Segment(0, 9, 4), Segment(1, 2, 1)]
    for batch in (firsts, nexts):
        rows = token_ids[: sum(each.num_tokens for each in batch)]
        expected = at.plain.logits(rows, batch)
        assert (at.pipeline.logits(rows, batch) - expected).abs().max() < 1e-4


def test_neither_keys_nor_values_nor_queries_are_seen_as_they_are(home, token_ids):
    at = home()
    at.plain.hidden(token_ids, [Segment(0, 0, 23)])
    layers = at.plain.caches[0].export(0, range(23))
    at.pipeline.hidden(token_ids, [Segment(0, 0, 23)])
    plain = {row.tobytes() for layer in layers for each in layer for head in each for row in head}
    heard = [row for array in at.link.heard for head in array for row in head]
    assert len(heard) >= 2 * 4 * 2 * 23
    assert not [row for row in heard if row.tobytes() in plain]
    # A rotation hides no length, and is no more than this claims to be.
    assert not np.allclose(at.link.heard[0][0, 0], layers[0].keys[0, 0], atol=1e-3)


def test_rows_that_come_together_are_not_sent_in_their_order(home, token_ids):
    at = home()
    pipeline = at.pipeline
    pipeline.hidden(token_ids[:8], [Segment(0, 0, 8)])
    at.link.heard.clear()
    pipeline.hidden(token_ids[8:23], [Segment(0, 8, 15)])
    at.plain.hidden(token_ids, [Segment(0, 0, 23)])
    (layer, *_) = at.plain.caches[0].export(0, range(8, 23))
    sent, plain = (np.linalg.norm(each[0], axis=1) for each in (at.link.heard[0], layer.keys))
    assert np.allclose(np.sort(sent), np.sort(plain), rtol=1e-4)
    assert not np.allclose(sent, plain, rtol=1e-2)


def test_decoys_are_held_with_the_rows_and_are_others_in_each_session(home, token_ids):
    heard = []
    for _ in range(2):
        at = home(num_decoys=5)
        at.pipeline.hidden(token_ids[:8], [Segment(0, 0, 8)])
        heard.append(np.linalg.norm(at.link.heard[0][0], axis=1))
        at.pipeline.hidden(token_ids[8:9], [Segment(0, 8, 1)])
        assert at.link.worker._held[0, 0] == 8 + 5 + 1
        at.pipeline.caches[0].truncate(0, 8)
        assert at.link.worker._held[0, 0] == 8 + 5
    assert len(heard[0]) == len(heard[1]) == 8 + 5
    apart = abs(heard[0][:, None] - heard[1]).min(1)
    assert (apart < 1e-4 * heard[0]).sum() < 13  # the text's alone


def test_one_time_keys_are_renewed_before_there_are_many(home, token_ids):
    at = home(is_one_time=True)
    expected, expected_logits = at.plain.greedy(token_ids[:4], 40)
    sizes, ask = [], at.link.ask

    def counting(header, tensors=(), meanwhile=None):
        sizes.append(len(header))
        return ask(header, tensors)

    at.link.ask = counting
    tokens, logits = at.pipeline.greedy(token_ids[:4], 40)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() < 1e-4
    assert max(sizes) < 128
    assert at.link.worker._held[0, 0] == 4 + 39


def test_rows_that_come_back_otherwise_to_be_renewed_end_the_session(home, token_ids):
    at = home(is_one_time=True)
    at.link.lie = lambda op, arrays: (
        [swapped(each) for each in arrays] if op is Op.FETCH else arrays
    )
    with pytest.raises(AnswerRefused, match="gives other rows back"):
        at.pipeline.greedy(token_ids[:4], 40)


def test_decoys_that_hide_a_text_end_the_session(home, token_ids):
    at = home(num_decoys=5)
    at.parts._decoys = [(1e4 * keys, values) for keys, values in at.parts._decoys]
    with pytest.raises(SessionError, match="decoy rows take all of the attention"):
        at.pipeline.greedy(token_ids[:4], 2)


def test_no_two_texts_have_a_key_in_common(home, token_ids):
    at = home(num_slots=2)
    heard = []
    for slot in (0, 1):
        at.link.heard.clear()
        at.pipeline.hidden(token_ids[:4], [Segment(slot, 0, 4)])
        heard.append(np.concatenate([each.reshape(-1) for each in at.link.heard]))
    assert heard[0].shape == heard[1].shape
    assert not np.allclose(heard[0], heard[1], atol=1e-2)


def test_the_last_step_can_be_taken_back(home, token_ids):
    at = home()
    cache = at.pipeline.caches[0]
    for batch, rows in (([Segment(0, 0, 8)], token_ids[:8]), ([Segment(0, 8, 1)], token_ids[9:10])):
        at.pipeline.hidden(rows, batch)
    cache.truncate(0, 8)
    at.plain.hidden(token_ids[:8], [Segment(0, 0, 8)])
    expected = at.plain.logits(token_ids[8:9], [Segment(0, 8, 1)])
    assert (at.pipeline.logits(token_ids[8:9], [Segment(0, 8, 1)]) - expected).abs().max() < 1e-4
    cache.truncate(0, 0)
    assert not at.link.worker._rows


def test_rows_in_another_order_cannot_be_taken_back(home, token_ids):
    at = home()
    at.pipeline.hidden(token_ids[:8], [Segment(0, 0, 8)])
    with pytest.raises(MessageError, match="cannot go back to 4"):
        at.pipeline.caches[0].truncate(0, 4)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_rows_come_back_as_they_were(home, token_ids, encoding):
    at = home(**encoding)
    for pipeline in (at.pipeline, at.plain):
        for first, count in ((0, 8), (8, 1), (9, 5), (14, 1)):
            rows = token_ids[first : first + count]
            pipeline.hidden(rows, [Segment(0, first, count)])
    found = at.pipeline.caches[0].export(0, range(2, 15))
    for mine, theirs in zip(found, at.plain.caches[0].export(0, range(2, 15)), strict=True):
        assert np.allclose(mine.keys, theirs.keys, atol=1e-4)
        assert np.allclose(mine.values, theirs.values, atol=1e-4)


def swapped(rows):
    rows[:, [0, 1]] = rows[:, [1, 0]]
    return rows


@pytest.mark.parametrize(
    "change",
    [
        lambda keys, values: (keys[:, :-1], values[:, :-1]),
        lambda keys, values: (swapped(keys), swapped(values)),
        lambda keys, values: (values, keys),
        lambda keys, values: (np.nextafter(keys, np.float32(np.inf)), values),
        lambda keys, values: (keys.astype(np.float64), values.astype(np.float64)),
    ],
    ids=["truncated", "swapped", "keys for values", "altered", "another type"],
)
def test_rows_that_come_back_otherwise_are_refused(home, token_ids, change):
    at = home()
    at.pipeline.hidden(token_ids[:8], [Segment(0, 0, 8)])
    at.link.lie = lambda op, arrays: change(*arrays) if op is Op.FETCH else arrays
    with pytest.raises(CacheRefused):
        at.pipeline.caches[0].export(0, range(8))


def test_older_rows_are_refused(home, token_ids):
    at = home()
    at.pipeline.hidden(token_ids[:8], [Segment(0, 0, 8)])
    place = at.link.worker._rows[0, 0]
    before = place[:, :, 7].copy()
    at.pipeline.hidden(token_ids[8:9], [Segment(0, 8, 1)])
    place[:, :, 8] = before
    with pytest.raises(CacheRefused):
        at.pipeline.caches[0].export(0, range(8))


@pytest.mark.parametrize(
    "lie",
    [
        lambda outputs, sums: [outputs * np.float32(np.nan), sums],
        lambda outputs, sums: [outputs * 1e6, sums],
        lambda outputs, sums: [outputs[:, :-1], sums[:, :-1]],
        lambda outputs, sums: [outputs, np.full_like(sums, np.inf)],
        lambda outputs, sums: [outputs],
        lambda outputs, sums: [outputs.view(np.uint32), sums],
    ],
    ids=["no numbers", "too long", "too few", "infinite sums", "no sums", "integers"],
)
def test_an_answer_that_no_attention_gives_is_refused(home, token_ids, lie):
    at = home()
    at.pipeline.hidden(token_ids[:8], [Segment(0, 0, 8)])
    at.link.lie = lambda op, arrays: lie(*arrays)
    with pytest.raises(AnswerRefused):
        at.pipeline.hidden(token_ids[8:9], [Segment(0, 8, 1)])


@pytest.mark.parametrize(
    "ago",
    [lambda layers: 1, lambda layers: layers, lambda layers: 2 * layers],
    ids=["of the layer before", "of the step before", "of the step before that"],
)
@pytest.mark.parametrize("encoding", ENCODINGS[:2], ids=str)
def test_an_old_answer_is_refused_and_the_text_goes_on_from_its_tokens(
    home, token_ids, ago, encoding
):
    at = home(**encoding)
    expected, _ = at.plain.greedy(token_ids, 6)
    at.pipeline.hidden(token_ids, [Segment(0, 0, 23)])
    answers = []

    def lie(op, arrays):
        answers.append(arrays)
        num_layers = len(at.parts._layers)  # one answer of each in a step
        if len(answers) > 2 * num_layers:
            return answers[len(answers) - 1 - ago(num_layers)]
        return arrays

    at.link.lie = lie
    for position, token in enumerate(expected[:2], 23):
        at.pipeline.hidden(torch.tensor([token]), [Segment(0, position, 1)])
    with pytest.raises(AnswerRefused, match="an old one"):
        at.pipeline.hidden(torch.tensor(expected[2:3]), [Segment(0, 25, 1)])
    honest = opened(at.parts)
    at.pipeline.caches = [shard.new_cache(1, 128) for shard in at.pipeline.shards]
    assert at.pipeline.greedy(token_ids, 6)[0] == expected
    assert honest.heard


def test_a_model_that_looks_back_less_far_is_refused(make_oracle):
    with pytest.raises(InputError, match="look back 11 tokens"):
        AttentionParts(make_oracle("mistral-sliding-window").config)


def test_a_home_reserves_no_memory_for_what_is_held_elsewhere(home, token_ids):
    at = home()
    (shard,) = at.pipeline.shards
    assert shard.kv_bytes(64, 1 << 20) == 0
    at.pipeline.hidden(token_ids, [Segment(0, 0, 23)])
    assert at.pipeline.caches[0].num_bytes == 0
    with pytest.raises(MessageError, match="no key"):
        at.pipeline.caches[0].copy(0, 0, 4)


# The worker, whatever it is asked


def test_a_session_that_would_not_fit_is_refused(make_oracle):
    with pytest.raises(PartRefusal, match="are left of its memory"):
        opened(AttentionParts(make_oracle(FAMILY).config), memory=1000)
