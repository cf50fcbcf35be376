"""Activations as they travel: the numbers that torch's conversions give, bit for bit."""

import numpy as np
import pytest
import torch

from pipeline.codecs.plain import Plain
from pipeline.dtypes import BFLOAT16, FLOAT16, from_floats, to_floats
from pipeline.errors import MessageError
from transport.tensor_frames import DType, Tensor, TensorSpec

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
    (tensor,) = Plain(dtype, 8).encode(hidden)
    assert tensor.spec == TensorSpec(dtype, (3, 8))
    expected = torch.from_numpy(hidden).to(TORCH[dtype])
    assert bytes(tensor.data) == expected.view(torch.uint8).numpy().tobytes()
    assert_same(Plain(dtype, 8).decode((tensor,)), expected)


def test_float32_is_not_copied():
    hidden = np.zeros((2, 4), np.float32)
    codec = Plain(DType.F32, 4)
    found = codec.decode(codec.encode(hidden))
    hidden[1, 2] = 5
    assert found[1, 2] == 5


def rows_with(value):
    rows = np.full((3, 8), 0.5, np.float32)
    rows[1, 5] = value
    return rows


@pytest.mark.parametrize(
    ("dtype", "most"), [(DType.F16, 65504.0), (DType.BF16, 2.0**128 - 2.0**120)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_exceeds_a_number_format_becomes_its_greatest(dtype, most, sign):
    codec = Plain(dtype, 8)
    for value in (most, np.nextafter(np.float32(most), np.float32(np.inf)), 3.4e38):
        decoded = codec.decode(codec.encode(rows_with(sign * value)))
        assert (decoded == rows_with(sign * most)).all()


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_not_sent(dtype, value):
    with pytest.raises(MessageError, match="activations are not finite"):
        Plain(dtype, 8).encode(rows_with(value))


@pytest.mark.parametrize(("dtype", "bits"), [(DType.F16, 0x7C00), (DType.BF16, 0xFF80)])
@pytest.mark.parametrize("beyond", [0, 1])
def test_what_no_encoder_writes_is_refused(dtype, bits, beyond):
    codec = Plain(dtype, 8)
    (tensor,) = codec.encode(rows_with(1.0))
    data = np.frombuffer(tensor.data, np.uint16).copy()
    data[9] = bits + beyond  # an infinity, or not a number
    with pytest.raises(MessageError, match="activations are not finite"):
        codec.decode((Tensor(tensor.spec, memoryview(data).cast("B")),))
