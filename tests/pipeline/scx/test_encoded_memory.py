"""A stage whose memory is encoded says what it said, and its memory does not."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.errors import InputError, SessionRefused
from pipeline.models.registry import load_shard
from pipeline.protocol.batch import Segment
from pipeline.protocol.tide_window import TideWindow
from pipeline.scx.attention_parts import Encoding
from pipeline.scx.encoded_memory import EncodedMemory, EncodedRowByRow

SEED = bytes(range(32))


@pytest.fixture(params=["gpt2", "llama-untied-gqa", "mistral-sliding-window"])
def oracle_of(request, make_oracle, kernels):
    return make_oracle(request.param).computing_with(kernels)


def encoded(oracle, kernels, seed=SEED):
    parts = EncodedMemory(oracle.config)
    parts.use(seed)
    middle = load_shard(
        oracle.directory, oracle.config, 1, 3, kernels=kernels, parts=parts, expected_hashes=None
    )
    return parts, middle


def test_the_text_is_the_same(oracle_of, kernels, make_pipeline, token_ids):
    _, middle = encoded(oracle_of, kernels)
    first, _, last = oracle_of.split(1, 3)
    tokens, logits = make_pipeline([first, middle, last]).greedy(token_ids, 10)
    expected, expected_logits = make_pipeline(oracle_of.split(1, 3)).greedy(token_ids, 10)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() < 1e-4


def test_a_recorded_step_has_the_bits_of_its_calls_one_by_one(oracle_of, kernels, token_ids):
    _, middle = encoded(oracle_of, kernels)
    if not middle.decodes(1):
        pytest.skip("these kernels record no steps")
    rows = np.linspace(-1, 1, 12 * oracle_of.config.hidden_dim, dtype=np.float32).reshape(12, -1)
    recorded, plain = (middle.new_cache(2, 32) for _ in range(2))
    for cache in (recorded, plain):
        middle.forward(rows[:6], [Segment(0, 0, 2), Segment(1, 0, 4)], cache)
    for at, batch in ((6, [Segment(1, 4, 1), Segment(0, 2, 1)]), (8, [Segment(0, 3, 1)])):
        some = rows[at : at + len(batch)]
        found, _ = middle.decode(some.tobytes(), batch, recorded)
        assert found == middle.forward(some, batch, plain).tobytes()


async def test_with_noise_and_keys_of_each_step_the_text_is_the_same(
    make_oracle, kernels, make_pipeline, token_ids
):
    oracle = make_oracle("llama-untied-gqa").computing_with(kernels)
    parts = EncodedRowByRow(oracle.config, Encoding(noise=1.0, is_one_time=True), range(1, 3))
    middle = load_shard(
        oracle.directory, oracle.config, 1, 3, kernels=kernels, parts=parts, expected_hashes=None
    )
    first, _, last = oracle.split(1, 3)
    expected, expected_logits = make_pipeline(oracle.split(1, 3)).greedy(token_ids, 24)
    limits = SimpleNamespace(num_slots=1, max_seq_len=128)
    seeds = []
    for seed in (SEED, SEED[::-1]):
        async with parts.with_seed(limits, lambda text: None, seed):
            tokens, logits = make_pipeline([first, middle, last]).greedy(token_ids, 24)
            seeds.append(parts._new_keys().seed)
        assert tokens == expected
        assert (logits - expected_logits).abs().max() < 1e-4
        assert not parts._held
    assert seeds == [SEED, SEED[::-1]]
    with pytest.raises(SessionRefused, match="hands over no keys"):
        async with parts.with_seed(limits, lambda text: None, None):
            pass


def test_what_lies_in_memory_is_not_what_an_ordinary_stage_keeps(
    oracle_of, kernels, make_pipeline, token_ids
):
    kept = []
    for shard in (oracle_of.split(1, 3)[1], encoded(oracle_of, kernels)[1]):
        rows = np.linspace(-1, 1, 8 * oracle_of.config.hidden_dim, dtype=np.float32)
        cache = shard.new_cache(1, 32)
        shard.forward(rows.reshape(8, -1), [Segment(0, 0, 8)], cache)
        kept.append(cache.export(0, range(8)))
    for plain, mine in zip(*kept, strict=True):
        for one, other in zip(plain, mine, strict=True):
            assert not np.isclose(one, other, atol=1e-3).all(-1).any()
            norms = (np.linalg.norm(each, axis=-1) for each in (one, other))
            assert np.allclose(*norms, rtol=1e-4)  # a rotation, and no more


def test_keys_are_another_sessions_own(make_oracle, kernels):
    parts, _ = encoded(make_oracle("gpt2"), kernels)
    before = parts.matrices(1)[0]
    parts.use(SEED)
    assert abs(before - parts.matrices(1)[0]).max() > 0.1


async def test_a_session_without_keys_is_refused(make_oracle, kernels):
    parts, _ = encoded(make_oracle("gpt2"), kernels)
    with pytest.raises(SessionRefused, match="hands over no keys"):
        async with parts.session(None, lambda text: None, None):
            pass


def test_a_window_is_refused(make_oracle, kernels):
    _, middle = encoded(make_oracle("llama-untied-gqa"), kernels)
    with pytest.raises(InputError, match="a window moves cached keys"):
        middle.check_window(TideWindow(16, 4))
