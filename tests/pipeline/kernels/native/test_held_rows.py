"""Rows of heads times a matrix, in another order, and attention over rows that lie as they came."""

import numpy as np
import pytest

from pipeline.kernels.runtime import set_num_threads

RNG = np.random.default_rng(11)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


@pytest.mark.parametrize(("groups", "width"), [(1, 16), (3, 64), (7, 80), (15, 112)])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_each_head_is_turned_by_its_own_matrix(native, groups, width, num_threads):
    heads, rows = 2, 37
    whole = normal(rows, heads * groups * width + 24)
    before, matrices = whole.copy(), normal(heads, width, width)
    part = whole[:, 8:-16]
    sizes = (whole.shape[1], rows, heads, groups, width)
    set_num_threads(num_threads)
    try:
        native.turn_heads(part, *sizes, matrices, 0.25)
    finally:
        set_num_threads(1)
    expected = before[:, 8:-16].reshape(rows, heads, groups, width) * np.float32(0.25) @ matrices
    assert np.allclose(part, expected.reshape(rows, -1), rtol=1e-4, atol=1e-4)
    assert (whole[:, :8] == before[:, :8]).all()
    assert (whole[:, -16:] == before[:, -16:]).all()


def test_a_turned_row_has_the_same_bits_alone(native):
    rows, matrices = normal(20, 2 * 3 * 64), normal(2, 64, 64)
    together, alone = rows.copy(), rows.copy()
    native.turn_heads(together, 384, 20, 2, 3, 64, matrices, 1.0)
    for row in alone:
        native.turn_heads(row, 384, 1, 2, 3, 64, matrices, 1.0)
    assert (together == alone).all()


@pytest.mark.parametrize("width", [16, 64, 80])
@pytest.mark.parametrize("count", [0, 1, 5, 6, 29])
def test_rows_are_taken_in_an_order(native, width, count):
    rows, matrix = normal(29, width), normal(width, width)
    order = RNG.permutation(29)[:count]
    taken, turned = np.zeros((2, count, width), np.float32)
    native.take_rows(rows, 29, order, count, width, None, taken)
    native.take_rows(rows, 29, order, count, width, matrix, turned)
    assert (taken == rows[order]).all()
    assert np.allclose(turned, rows[order] @ matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 15, 16, 333])
@pytest.mark.parametrize(("num_queries", "width"), [(1, 16), (3, 64), (13, 80)])
def test_queries_attend_to_rows_as_they_lie(native, num_rows, num_queries, width):
    heads, room = 3, 400
    place = normal(2, heads, room, width)
    keys, values = (each[:, 5 : 5 + num_rows] for each in place)
    queries = normal(heads, num_queries, width) / 4
    outputs, sums = np.zeros_like(queries), np.zeros((heads, num_queries))
    sizes = (room * width, heads, num_queries, num_rows, width)
    native.attend_rows(queries, keys, values, *sizes, outputs, sums)
    weights = np.exp(queries.astype(np.float64) @ keys.mT.astype(np.float64))
    total = weights.sum(-1, keepdims=True)
    assert np.allclose(outputs, weights @ values / total, rtol=1e-4, atol=1e-5)
    assert np.allclose(sums, np.log(total[..., 0]), rtol=1e-6, atol=1e-5)


def test_what_is_no_number_is_handed_on(native):
    keys = normal(1, 20, 16)
    keys[0, 3] = np.nan
    outputs, sums = np.zeros((1, 1, 16), np.float32), np.zeros((1, 1))
    native.attend_rows(normal(1, 1, 16), keys, normal(1, 20, 16), 320, 1, 1, 20, 16, outputs, sums)
    assert np.isnan(outputs).all()
    assert not np.isfinite(sums).any()


def test_sizes_that_cannot_be_are_refused(native):
    rows, matrix, order = normal(4, 64), normal(64, 64), np.array([1, 4])
    with pytest.raises(ValueError, match="multiple of 16"):
        native.turn_heads(rows, 64, 4, 1, 1, 20, matrix, 1.0)
    with pytest.raises(ValueError, match="exceed a row"):
        native.turn_heads(rows, 64, 4, 2, 1, 64, matrix, 1.0)
    with pytest.raises(ValueError, match="no such row: 4"):
        native.take_rows(rows, 4, order, 2, 64, matrix, normal(2, 64))
    with pytest.raises(ValueError, match="multiple of 16"):
        native.take_rows(rows, 4, order, 1, 72, None, normal(2, 64))
    sums = np.zeros((1, 4))
    with pytest.raises(ValueError, match="rows exceed"):
        native.attend_rows(rows, rows, rows, 100, 1, 4, 4, 64, rows.copy(), sums)
    with pytest.raises(ValueError, match="rows: 0"):
        native.attend_rows(rows, rows, rows, 256, 1, 4, 0, 64, rows.copy(), sums)
