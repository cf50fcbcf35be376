"""Products are right on either path, and the fast one is used only where it proves itself."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from pipeline.models import linear
from pipeline.models.linear import Linear, blas_matvec, choose_matvec
from pipeline.models.runtime import set_num_threads


@pytest.mark.parametrize("matvec", [torch.mm, blas_matvec], ids=["torch", "blas"])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_equals_torchs_with_the_checkpoints_layout(matvec, rows, bias):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(48, 80, bias=bias, dtype=torch.float32, matvec=matvec)
    layer.weight.copy_(torch.randn(48, 80, generator=generator))
    if layer.bias is not None:
        layer.bias.copy_(torch.randn(80, generator=generator))
    x = torch.randn(rows, 48, generator=generator)
    expected = F.linear(x, layer.out_in(), layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.equal(layer(x), layer(x))


def test_a_blas_that_cannot_be_governed_is_not_used(monkeypatch):
    monkeypatch.setattr(linear, "pin_blas", lambda: False)
    assert choose_matvec() is torch.mm


def test_a_blas_that_computes_wrongly_is_not_used(monkeypatch):
    monkeypatch.setattr(linear, "pin_blas", lambda: True)
    monkeypatch.setattr(linear, "blas_matvec", lambda row, weight: torch.mm(row, weight) * 1.001)
    assert choose_matvec() is torch.mm


def test_at_least_one_thread_computes():
    with pytest.raises(ValueError, match="num_threads=0"):
        set_num_threads(0)


def test_the_number_of_threads_does_not_change_a_single_rows_bits():
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 576, generator=generator)
    weight = torch.randn(576, 3072, generator=generator)
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2):
            set_num_threads(num_threads)
            assert torch.get_num_threads() == num_threads
            found.append(blas_matvec(row, weight))
    finally:
        set_num_threads(before)
    assert torch.equal(*found)
