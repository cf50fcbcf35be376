"""Four bits: what they mean, and that floats come as near to it as they can."""

import numpy as np
import pytest

from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, from_floats
from pipeline.weights.int4 import (
    INT4_MAX,
    Int4,
    dequantise_int4,
    for_groups,
    pack_nibbles,
    quantise_int4,
    unpack_nibbles,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain_grid(group):
    """Sixteen levels from a group's least number, or 0, to its greatest; nothing is sought."""
    low, high = min(0, group.min()), max(0, group.max())
    step = np.float64(np.float16((high - low) / INT4_MAX))
    zero = np.float64(np.float16(-low / step))
    return (np.clip(np.rint(group / step + zero), 0, INT4_MAX) - zero) * step


@pytest.mark.parametrize("num_in", [32, 33, 64, 100])
def test_no_group_is_worse_than_the_plain_grid_over_its_numbers(num_in):
    weights = normal(20, num_in) ** 3  # a few are large
    off = (dequantise_int4(quantise_int4(weights)) - weights) ** 2
    plain_off = np.zeros(2)
    for row in range(20):
        for at in range(0, num_in, 32):
            group = np.zeros(32)
            group[: num_in - at] = weights[row, at : at + 32]
            plain = ((plain_grid(group) - group) ** 2).sum()
            own = off[row, at : at + 32].sum()
            assert own <= plain * 1.001
            plain_off += own, plain
    assert plain_off[0] < 0.95 * plain_off[1]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=["f32", "f16", "bf16"])
def test_what_four_bits_can_say_is_said_exactly(dtype):
    """Levels of a scale and a zero that are there: of any format with such groups."""
    random = np.random.default_rng(0)
    levels = random.integers(0, 16, (30, 96), np.uint8)
    levels[:, ::32], levels[:, 1::32] = 0, 15
    zeros = random.integers(0, 16, (30, 3)).astype(FLOAT16)
    weights = dequantise_int4(Int4(levels, np.full((30, 3), 0.125, FLOAT16), zeros))
    np.testing.assert_array_equal(
        dequantise_int4(quantise_int4(from_floats(weights, dtype))), weights
    )


def test_zeros_stay_zeros_and_what_is_not_a_number_is_none():
    weights = normal(6, 32)
    weights[0] = 0
    weights[1, 5], weights[2, 6], weights[3, 7] = np.nan, np.inf, -3e38
    weights[4] *= 1e-12
    held = dequantise_int4(quantise_int4(weights))
    assert (held[[0, 4]] == 0).all()
    assert np.isnan(held[1:4]).all()
    assert np.isfinite(held[5]).all()


def test_two_levels_share_a_byte():
    levels = np.random.default_rng(0).integers(0, 16, (3, 10), np.uint8)
    packed = pack_nibbles(levels)
    assert packed.shape == (3, 5)
    assert packed[1, 2] == levels[1, 4] | levels[1, 5] << 4
    np.testing.assert_array_equal(unpack_nibbles(packed), levels)


@pytest.mark.parametrize(("size", "num_in"), [(32, 96), (64, 160), (128, 256), (None, 70)])
def test_larger_groups_give_theirs_to_each_of_32_inputs(size, num_in):
    groups = 1 if size is None else -(-num_in // size)
    sides = np.arange(2 * groups).reshape(2, groups)
    found = for_groups(sides, size, num_in)
    expected = [[row[at // (size or num_in)] for at in range(0, num_in, 32)] for row in sides]
    np.testing.assert_array_equal(found, expected)
