"""Rows in another order, times a matrix: the same with a kernel and without, in chunks or not."""

import numpy as np
import pytest

from pipeline.scx import products

NUM_ROWS, WIDTH = 2500, 20  # more than two chunks, and no multiple of a register


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("is_permuted", [True, False])
@pytest.mark.parametrize("is_apart", [True, False])
def test_rows_are_put_in_order_and_multiplied(
    monkeypatch, has_kernel, dtype, is_dense, is_permuted, is_apart
):
    if not has_kernel:
        monkeypatch.setattr(products, "_native", lambda: None)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(NUM_ROWS, 3, WIDTH)).astype(dtype)[:, 1]  # every third row
    rows = rows if is_apart else np.ascontiguousarray(rows)
    matrix = rng.normal(size=(WIDTH, WIDTH)).astype(dtype) if is_dense else None
    order = rng.permutation(NUM_ROWS) if is_permuted else None
    encoded = np.empty((NUM_ROWS, WIDTH), dtype)
    products.encode_head(rows, matrix, order, encoded)
    expected = rows if order is None else rows[order]
    expected = expected if matrix is None else expected @ matrix
    assert np.allclose(encoded, expected, rtol=1e-5, atol=1e-5)
    if not is_dense:
        assert (encoded == expected).all()
