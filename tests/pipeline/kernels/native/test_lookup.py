import numpy as np
import pytest

from pipeline.dtypes import BFLOAT16, from_floats, to_floats
from pipeline.weights.quantization import dequantise, quantise

IDS = np.array([4, 0, 4, 6])
RNG = np.random.default_rng(7)


@pytest.fixture(params=[16, 32, 64, 72, 5, 33])
def table(request):
    return normal(7, request.param)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def stored(native, kind, table):
    """What the kind holds of a table, and the values that mean."""
    if kind == native.I8:
        values, scales = quantise(table)
        return np.ascontiguousarray(values), scales, dequantise(values, scales)
    held = from_floats(table, BFLOAT16) if kind == native.BF16 else table
    return held, None, to_floats(held)


@pytest.mark.parametrize("name", ["F32", "BF16", "I8"])
@pytest.mark.parametrize("adds", [False, True])
def test_rows_are_what_the_table_means(native, table, name, adds):
    kind, (num_rows, width) = getattr(native, name), table.shape
    held, scales, values = stored(native, kind, table)
    before = normal(5, width)
    out = before.copy()
    native.lookup(kind, held, scales, num_rows, width, IDS, 1, 4, adds, out)
    expected = before[:4] + values[IDS] if adds else values[IDS]
    np.testing.assert_array_equal(out, np.vstack((expected, before[4:])))


def test_ids_may_lie_apart(native, table):
    ids = np.full((4, 3), 99)
    ids[:, 2] = IDS
    out = np.empty((4, table.shape[1]), np.float32)
    native.lookup(native.F32, table, 0, *table.shape, ids[:, 2], 3, 4, False, out)
    np.testing.assert_array_equal(out, table[IDS])


@pytest.mark.parametrize("bad", [-1, 7])
def test_a_row_that_does_not_exist_is_refused(native, table, bad):
    out = np.zeros((2, table.shape[1]), np.float32)
    ids = np.array([0, bad])
    with pytest.raises(ValueError, match="no such row"):
        native.lookup(native.F32, table, None, *table.shape, ids, 1, 2, False, out)
    assert not out.any()
