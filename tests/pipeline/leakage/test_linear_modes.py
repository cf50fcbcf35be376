"""What a worker of linears sees: noise under masks; of mixed rows, the prompt."""

import numpy as np
import pytest

from pipeline.leakage.attacks.row_space import row_space
from pipeline.leakage.evidence import Evidence, Pairs
from pipeline.leakage.linear_models import LinearHost, opened_linear_model
from pipeline.leakage.modes import MODES
from pipeline.leakage.uniformity import held_against_uniform
from pipeline.leakage.views import masked, mixed
from pipeline.offload.fixed_point import to_ring

LEAST = 1e-6  # of a right generator's results one in a million is less likely than that


def rows_of(num_rows, width, seed=0):
    return np.random.default_rng(seed).standard_normal((num_rows, width)).astype(np.float32)


def test_what_a_worker_of_masked_linears_sees_is_uniform(tiny_model):
    host = LinearHost.load(tiny_model)
    with opened_linear_model(MODES["offload"], tiny_model, (2,), host, 32) as model:
        host.seen = []
        model.rows_at_cuts(model.embed(range(100, 132)))
        sent = np.concatenate([each.reshape(-1) for each in host.seen])
    found = held_against_uniform(sent)
    assert found.words == 32 * sum(each.num_in for each in host.linears)
    assert LEAST < found.p_value < 1 - LEAST


def test_what_is_sent_without_masks_is_not():
    words, _ = to_ring(rows_of(32, 500), 1 << 30)
    assert held_against_uniform(words).p_value < 1e-9


def test_one_bit_that_is_set_too_often_is_found():
    words = np.random.default_rng(0).integers(0, 1 << 64, 100_000, np.uint64)
    assert held_against_uniform(words).p_value > LEAST
    words[::8] |= np.uint64(1)
    assert held_against_uniform(words).p_value < LEAST


@pytest.mark.parametrize("name", ["offload", "mix"])
def test_the_model_predicts_what_it_does_plainly(tiny_model, name):
    host = LinearHost.load(tiny_model)
    text = list(range(100, 116))
    with opened_linear_model(MODES[name], tiny_model, (), host, len(text)) as model:
        found = model.logits(model.rows_at_cuts(model.embed(text))[4])
    plain = type(model).load(tiny_model, ())
    expected = plain.logits(plain.rows_at_cuts(plain.embed(text))[4])
    assert np.abs(found - expected).max() < 1e-4


def nearest_in_span(observed, candidates):
    pairs = Pairs(observed, observed)
    comparison = row_space(Evidence(observed, observed[:0], pairs, pairs, observed[None]))
    target, features = comparison.at(0, {})
    return np.square(features(candidates) - target).sum(axis=1)


def test_mixed_rows_are_found_among_all_there_are():
    vocabulary = rows_of(500, 64)
    text = [3, 77, 401, 250, 9, 12, 499, 100, 31]
    seen = mixed(64, np.random.default_rng(1)).observe(vocabulary[text] * 7)
    left = nearest_in_span(seen, vocabulary)
    assert set(np.argsort(left)[: len(text)].tolist()) == set(text)
    assert left[text].max() < 1e-6 < np.delete(left, text).min()


def test_masked_rows_are_not():
    vocabulary = rows_of(500, 64)
    text = [3, 77, 401, 250, 9, 12, 499, 100, 31]
    left = nearest_in_span(
        masked(64, np.random.default_rng(1)).observe(vocabulary[text]), vocabulary
    )
    assert left[text].min() > 0.5


def test_a_text_as_long_as_rows_are_wide_hides_in_its_own_span():
    vocabulary = rows_of(200, 16)
    seen = mixed(16, np.random.default_rng(1)).observe(vocabulary[:16])
    assert nearest_in_span(seen, vocabulary).max() < 1e-6
