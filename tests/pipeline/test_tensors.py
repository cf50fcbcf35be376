"""Activations as they travel: the numbers that torch's conversions give, bit for bit."""

import numpy as np
import pytest
import torch

from pipeline.dtypes import BFLOAT16, FLOAT16, from_floats, to_floats
from pipeline.errors import MessageError
from pipeline.tensors import activation_from_wire, activation_to_wire
from transport.frames import DType, Tensor, TensorSpec

TORCH = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}


def awkward_floats():
    """Every pattern of the upper half of a float32, with lower halves where rounding turns."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] | lower).view(np.float32)


def assert_same(found, expected):
    """The same bits; of what is no number only that it is none."""
    found, expected = (torch.as_tensor(each).float() for each in (found, expected))
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.nan_to_num(), expected.nan_to_num()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(
    ("dtype", "other"), [(BFLOAT16, torch.bfloat16), (FLOAT16, torch.float16)], ids=str
)
def test_narrowing_rounds_as_torch_does(dtype, other):
    values = awkward_floats()
    expected = torch.from_numpy(values).to(other)
    found = to_floats(from_floats(values, dtype))
    assert_same(found, expected)


def test_every_bfloat16_widens_to_what_it_is():
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    assert_same(to_floats(bits), expected)
    assert_same(to_floats(bits.reshape(256, 256).T), expected.view(256, 256).T)


@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_rows_arrive_as_they_were_rounded(dtype):
    hidden = np.random.default_rng(0).standard_normal((3, 8), np.float32)
    tensor = activation_to_wire(hidden, dtype)
    assert tensor.spec == TensorSpec(dtype, (3, 8))
    expected = torch.from_numpy(hidden).to(TORCH[dtype])
    assert bytes(tensor.data) == expected.view(torch.uint8).numpy().tobytes()
    assert_same(activation_from_wire(tensor), expected)


def test_float32_is_not_copied():
    hidden = np.zeros((2, 4), np.float32)
    found = activation_from_wire(activation_to_wire(hidden, DType.F32))
    hidden[1, 2] = 5
    assert found[1, 2] == 5


def test_integers_are_no_activations():
    with pytest.raises(MessageError, match="arrived as U32"):
        activation_from_wire(Tensor(TensorSpec(DType.U32, (1,)), memoryview(bytes(4))))
