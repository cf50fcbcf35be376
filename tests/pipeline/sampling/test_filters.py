import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.sampling.filters import (
    add_bias,
    count_penalties,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_softmax,
    most_likely,
    repetition_penalty,
    scale_temperature,
)

LOGITS = hnp.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.one_of(st.floats(-30, 30, width=32), st.just(-np.inf)),
).filter(lambda logits: np.isfinite(logits.max()))


def random_logits(seed, vocab=1000):
    return np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)


def oracle(processor, logits, token_ids=(0,)):
    ids = torch.tensor([list(token_ids)])
    return processor(ids, torch.from_numpy(logits.copy())[None])[0].numpy()


def probabilities(logits):
    weights = np.exp((logits - logits.max()).astype(np.float64))
    return weights / weights.sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 50, 999, 1000, 5000])
def test_top_k_keeps_what_transformers_keeps(seed, k):
    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_top_k(logits, k), oracle(TopKLogitsWarper(k), logits))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.95, 0.999])
def test_top_p_keeps_what_transformers_keeps(seed, p):
    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_top_p(logits, p), oracle(TopPLogitsWarper(p), logits))


@pytest.mark.parametrize("p", [0.5, 0.99, 0.999999])
def test_top_p_of_a_flat_distribution_looks_beyond_its_first_guess(p):
    logits = random_logits(1, vocab=20_000) / np.float32(100)
    np.testing.assert_array_equal(
        np.isfinite(keep_top_p(logits, p)), np.isfinite(oracle(TopPLogitsWarper(p), logits))
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.999])
def test_min_p_keeps_what_transformers_keeps(seed, p):
    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_min_p(logits, p), oracle(MinPLogitsWarper(p), logits))


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 1.9, 50.0])
def test_temperature_gives_the_probabilities_transformers_gives(temperature):
    logits = random_logits(0)
    ours = probabilities(scale_temperature(logits, temperature))
    theirs = probabilities(oracle(TemperatureLogitsWarper(temperature), logits))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits = random_logits(0)
    token_ids = [5, 7, 7, 999]
    is_seen = np.zeros(1000, np.bool_)
    is_seen[token_ids] = True
    expected = oracle(RepetitionPenaltyLogitsProcessor(penalty), logits, token_ids)
    np.testing.assert_allclose(repetition_penalty(logits, is_seen, penalty), expected, rtol=1e-6)


def test_presence_counts_once_and_frequency_each_time():
    logits = np.array([1, 1, 1], np.float32)
    counts = np.array([0, 1, 3], np.int32)
    np.testing.assert_allclose(count_penalties(logits, counts, 0.5, 0.25), [1, 0.25, -0.25])


def test_bias_is_added_to_its_tokens_only_and_leaves_the_input_alone():
    logits = np.zeros(4, np.float32)
    np.testing.assert_array_equal(add_bias(logits, {1: 2.5, 3: -100.0}), [0, 2.5, 0, -100])
    assert not logits.any()


def test_bias_on_a_token_the_model_does_not_have_changes_nothing():
    assert not add_bias(np.zeros(4, np.float32), {4: 1.0, 10**9: 1.0}).any()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6])
def test_a_tiny_temperature_is_greedy_and_no_overflow(temperature):
    scaled = scale_temperature(np.array([-3e38, 5, 4.9], np.float32), temperature)
    assert probabilities(scaled).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1.7e308])
def test_a_huge_temperature_makes_all_alike_that_are_not_masked(temperature):
    scaled = scale_temperature(np.array([5, -np.inf, 4], np.float32), temperature)
    np.testing.assert_allclose(probabilities(scaled), [0.5, 0, 0.5], atol=1e-6)


@given(LOGITS, st.floats(0, 1))
def test_top_p_keeps_the_smallest_sufficient_set(logits, p):
    kept = np.isfinite(keep_top_p(logits, p))
    chances = probabilities(logits)
    assert kept.any()
    assert chances[kept].sum() >= p - 1e-6
    # Without its least likely member the set would fall short, and no token left out beats one in.
    assert kept.sum() == 1 or chances[kept].sum() - chances[kept].min() < p + 1e-6
    assert chances[kept].min() >= chances[~kept].max(initial=0)


@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_exactly_k_and_the_most_likely(logits, k):
    masked = keep_top_k(logits, k)
    kept = np.isfinite(masked)
    assert kept.sum() == min(k, np.isfinite(logits).sum())
    assert logits[kept].min() >= logits[~kept].max(initial=-np.inf)
    np.testing.assert_array_equal(masked[kept], logits[kept])


@given(LOGITS, st.floats(1e-6, 1))
def test_min_p_never_drops_the_most_likely(logits, p):
    assert keep_min_p(logits, p)[logits.argmax()] == logits.max()


@given(LOGITS, st.integers(0, 50))
def test_most_likely_is_the_head_of_the_stably_sorted_vocabulary(logits, num):
    expected = sorted(range(logits.size), key=lambda i: (-logits[i], i))[:num]
    assert most_likely(logits, num).tolist() == expected


@settings(max_examples=50)
@given(LOGITS)
def test_log_softmax_is_that_of_torch(logits):
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 0).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-6, atol=1e-6)
