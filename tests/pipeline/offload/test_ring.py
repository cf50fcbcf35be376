import numpy as np
import pytest

from pipeline.kernels.kernel_selection import why_not_native
from pipeline.offload import ring
from pipeline.offload.ring import RingMatrix

SIZES = [(1, 1), (3, 5), (8, 8), (17, 41), (64, 130), (576, 40), (96, 323)]
ROWS = (0, 1, 2, 3, 4, 5, 9)


@pytest.fixture(params=["native", "numpy"])
def arithmetic(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(ring, "why_not_native", lambda: "not asked for")
    elif why_not_native() is not None:
        pytest.skip(why_not_native())


def matrix_of(weight, *, is_wide, piece=None):
    num_out, num_in = weight.shape
    matrix = RingMatrix(num_in, num_out, is_wide=is_wide)
    for first in range(0, num_out, piece or num_out):
        matrix.put(first, weight[first : first + (piece or num_out)])
    return matrix


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), SIZES)
def test_a_product_is_exact_to_the_last_bit_of_the_ring(arithmetic, num_in, num_out, is_wide):
    rng = np.random.default_rng(num_in * num_out)
    dtype = np.int64 if is_wide else np.int32
    ends = np.iinfo(dtype)
    weight = rng.integers(ends.min, ends.max, (num_out, num_in), dtype, endpoint=True)
    weight.flat[:2] = [ends.min, ends.max][: weight.size]
    matrix = matrix_of(weight, is_wide=is_wide, piece=7)
    for rows in ROWS:
        x = rng.integers(0, 2**64, (rows, num_in), np.uint64, endpoint=False)
        x[:1] = 2**64 - 1
        expected = x.astype(object) @ weight.astype(object).T % 2**64
        found = matrix(x)
        assert found.dtype == np.uint64
        assert found.tolist() == expected.tolist()


def test_rows_that_are_part_of_others_are_multiplied_as_such(arithmetic):
    rng = np.random.default_rng(1)
    matrix = matrix_of(rng.integers(-9, 9, (12, 6), np.int32), is_wide=False)
    wide = rng.integers(0, 2**64, (5, 12), np.uint64)
    assert (matrix(wide[:, 3:9]) == matrix(wide[:, 3:9].copy())).all()


def test_the_kernel_gives_the_same_on_any_number_of_threads():
    if why_not_native() is not None:
        pytest.skip(why_not_native())
    from pipeline.kernels import _native

    rng = np.random.default_rng(2)
    matrix = matrix_of(rng.integers(-(2**31), 2**31, (999, 64), np.int64), is_wide=False)
    x = rng.integers(0, 2**64, (6, 64), np.uint64)
    expected = matrix(x)
    _native.set_num_threads(3)
    try:
        assert (matrix(x) == expected).all()
    finally:
        _native.set_num_threads(1)


def test_the_kernel_refuses_sizes_that_cannot_be():
    if why_not_native() is not None:
        pytest.skip(why_not_native())
    from pipeline.kernels import _native

    memory = np.zeros(64, np.uint64)
    for itemsize, num_in, num_out in ((2, 8, 8), (8, 0, 8), (8, 8, 0), (4, 1 << 40, 8)):
        with pytest.raises(ValueError, match=r"matrix|num_in|num_out"):
            _native.ring_product(itemsize, memory, memory, memory, 1, num_in, num_out)
