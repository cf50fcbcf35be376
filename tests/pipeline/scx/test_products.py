"""Rows in another order, times a matrix, and attention to rows: with a kernel and without."""

import numpy as np
import pytest

from pipeline.scx import products

NUM_ROWS = 250


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("is_permuted", [True, False])
@pytest.mark.parametrize("is_apart", [True, False])
@pytest.mark.parametrize("width", [20, 64])  # what no kernel takes, and what one does
def test_rows_are_put_in_order_and_multiplied(
    monkeypatch, has_kernel, dtype, is_dense, is_permuted, is_apart, width
):
    if not has_kernel:
        monkeypatch.setattr(products, "_native", lambda width: None)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(NUM_ROWS, 3, width)).astype(dtype)[:, 1]  # every third row
    rows = rows if is_apart else np.ascontiguousarray(rows)
    matrix = rng.normal(size=(width, width)).astype(dtype) if is_dense else None
    order = rng.permutation(NUM_ROWS) if is_permuted else None
    encoded = np.empty((NUM_ROWS, width), dtype)
    products.encode_head(rows, matrix, order, encoded)
    expected = rows if order is None else rows[order]
    expected = expected if matrix is None else expected @ matrix
    assert np.allclose(encoded, expected, rtol=1e-5, atol=1e-5)
    if not is_dense:
        assert (encoded == expected).all()


@pytest.mark.parametrize("count", [1, 16, 17])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_kernel_attends_as_products_do(monkeypatch, count, dtype):
    rng = np.random.default_rng(1)
    place = rng.normal(size=(2, 3, 90, 64)).astype(np.float32)
    keys, values = place[:, :, 10:77]
    queries = rng.normal(size=(3, count, 64)).astype(dtype) / 8
    found = products.attend_to(queries, keys, values)
    monkeypatch.setattr(products, "_native", lambda width: None)
    for mine, plain in zip(found, products.attend_to(queries, keys, values), strict=True):
        assert mine.dtype == plain.dtype
        assert np.allclose(mine, plain, rtol=1e-4, atol=1e-5)
