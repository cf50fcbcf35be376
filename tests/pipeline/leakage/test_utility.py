"""What is said of predictions: every position counts alike, whatever text it is in."""

import numpy as np
import pytest

from pipeline.leakage.utility import compare_logits


def test_every_position_counts_alike():
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32))
    other = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    found = compare_logits([(expected, expected), (expected[:1], other)])
    assert found.max_logit_difference == pytest.approx(np.log(2), rel=1e-6)
    # one of three: 0.5 log 2 + 0.25 log 1/2
    assert found.kl == pytest.approx(0.25 * np.log(2) / 3, rel=1e-6)
    assert found.greedy_agreement == pytest.approx(2 / 3)


def test_what_is_added_to_all_logits_of_a_row_changes_no_prediction():
    expected = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    found = compare_logits([(expected, expected + 3)])
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.greedy_agreement == 1
