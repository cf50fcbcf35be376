import numpy as np
import pytest

from pipeline.errors import ModelError
from pipeline.offload.fixed_point import from_ring, to_ring, weights_to_ring


def product(rows, weight):
    """Rows times weights [out, in] by way of the ring, with Python's integers."""
    fixed = weights_to_ring(weight).astype(object)
    reach = max(int(abs(fixed).sum(axis=1).max()), 1)
    words, scales = to_ring(rows, reach)
    exact = words.view(np.int64).astype(object) @ fixed.T
    assert abs(exact).max() < 2**63
    return from_ring((exact % 2**64).astype(np.uint64), scales)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 300.0, 1e30])
@pytest.mark.parametrize("weights", [1e-3, 0.05, 100.0])
def test_a_product_is_as_near_as_float32_is_and_never_wraps(scale, weights):
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((7, 96)) * weights).clip(-127, 127).astype(np.float32)
    rows = (rng.standard_normal((5, 96)) * scale).astype(np.float32)
    rows[1] = 0
    rows[2, 1:] = 0
    expected = rows.astype(np.float64) @ weight.astype(np.float64).T
    least = np.abs(rows).sum(axis=1, keepdims=True) * 2.0**-25  # of the weights' own rounding
    off = np.abs(product(rows, weight) - expected)
    assert (off <= least + np.abs(rows).max(axis=1, keepdims=True) * weights * 1e-6).all()


def test_the_worst_row_there_is_does_not_wrap():
    weight = np.full((1, 4096), 127.9, np.float32)
    rows = np.full((2, 4096), np.finfo(np.float32).max, np.float32)
    rows[1] = -rows[1]
    found = product(rows, weight)
    assert np.allclose(found, rows.astype(np.float64) @ weight.astype(np.float64).T, rtol=1e-6)


def test_a_row_that_holds_no_number_says_nothing_and_leaves_the_others_alone():
    rows = np.ones((4, 3), np.float32)
    rows[1, 2], rows[2, 0], rows[3, 1] = np.nan, np.inf, -np.inf
    words, scales = to_ring(rows, 1 << 24)
    alone, alone_scales = to_ring(rows[:1], 1 << 24)
    assert (words[1:] == 0).all()
    assert (words[0] == alone[0]).all()
    assert scales[0] == alone_scales[0]
    assert np.isnan(from_ring(words, scales)[1:]).all()


@pytest.mark.parametrize("weight", [128.0, -128.0, 1e30, np.nan, np.inf])
def test_a_weight_without_room_is_refused(weight):
    with pytest.raises(ModelError, match="no room"):
        weights_to_ring(np.array([[0.5, weight]], np.float32))
