import pytest
import torch

from pipeline.models.quant import dequantise, quantise

IDS = torch.tensor([4, 0, 4, 6])


@pytest.fixture(params=[16, 32, 64, 72, 5, 33])
def table(request):
    return torch.randn(7, request.param)


def stored(native, kind, table):
    """What the kind holds of a table, and the values that mean."""
    if kind == native.I8:
        values, scales = quantise(table)
        return values, scales, dequantise(values, scales)
    held = table.bfloat16() if kind == native.BF16 else table
    return held, None, held.float()


@pytest.mark.parametrize("name", ["F32", "BF16", "I8"])
@pytest.mark.parametrize("adds", [False, True])
def test_rows_are_what_the_table_means(native, table, name, adds):
    kind, (num_rows, width) = getattr(native, name), table.shape
    held, scales, values = stored(native, kind, table)
    before = torch.randn(5, width)
    out = before.clone()
    native.lookup(kind, held.contiguous(), scales, num_rows, width, IDS, 1, 4, adds, out)
    assert out[:4].equal(before[:4] + values[IDS] if adds else values[IDS])
    assert out[4].equal(before[4])


def test_ids_may_lie_apart(native, table):
    ids = torch.full((4, 3), 99)
    ids[:, 2] = IDS
    out = torch.empty(4, table.shape[1])
    native.lookup(native.F32, table, 0, *table.shape, ids[:, 2], 3, 4, False, out)
    assert out.equal(table[IDS])


@pytest.mark.parametrize("bad", [-1, 7])
def test_a_row_that_does_not_exist_is_refused(native, table, bad):
    out = torch.zeros(2, table.shape[1])
    ids = torch.tensor([0, bad])
    with pytest.raises(ValueError, match="no such row"):
        native.lookup(native.F32, table, None, *table.shape, ids, 1, 2, False, out)
    assert not out.any()
