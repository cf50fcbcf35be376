"""Packed rows mean what llama.cpp's own package, and the format's description, say they do."""

import gguf
import numpy as np
import pytest

from pipeline.gguf.block_types import BLOCK_TYPES, int4_of_rows, unpack_rows
from pipeline.weights.int4 import Int4, dequantise_int4
from tests.pipeline.gguf.scalar_blocks import SCALAR
from tests.pipeline.gguf_files import Types, random_blocks


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_are_unpacked_as_by_llama_cpps_package(name):
    kind = BLOCK_TYPES[name]
    assert (kind.size, kind.num_bytes) == gguf.GGML_QUANT_SIZES[Types[name]]
    rows = random_blocks(name, 5, kind.row_bytes(768), seed=1)
    expected = gguf.quants.dequantize(rows, Types[name])
    assert expected.shape == (5, 768)
    np.testing.assert_array_equal(unpack_rows(kind, rows), expected)
    across = np.asfortranarray(rows)  # of any strides
    np.testing.assert_array_equal(unpack_rows(kind, across), expected)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_each_weight_is_what_the_formats_description_says(name):
    kind = BLOCK_TYPES[name]
    rows = random_blocks(name, 3, kind.row_bytes(512), seed=2)
    size = kind.num_bytes
    expected = [
        [
            weight
            for start in range(0, len(row), size)
            for weight in SCALAR[name](row[start : start + size].tobytes())
        ]
        for row in rows
    ]
    np.testing.assert_allclose(unpack_rows(kind, rows), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_four_bits_stay_levels_with_scales_and_zeros(name):
    kind = BLOCK_TYPES[name]
    rows = random_blocks(name, 40, kind.row_bytes(512), seed=3)
    found = int4_of_rows(kind, rows)
    if not name.startswith("Q4"):
        assert found is None
        return
    exact = unpack_rows(kind, rows).reshape(-1, 32)
    held = dequantise_int4(Int4(*found)).reshape(-1, 32)
    if name == "Q4_0":
        np.testing.assert_array_equal(held, exact)
    most = np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(held - exact) <= 1e-3 * most + 1e-7).all()


def test_a_group_whose_weights_are_all_the_same_stays_so():
    kind = BLOCK_TYPES["Q4_1"]
    blocks = np.zeros(4, kind.layout)
    blocks["d"], blocks["m"] = [0, 0, 6e-8, 0.5], [0.25, -3, 1, 0]
    blocks["qs"] = 0xF0
    rows = blocks.view(np.uint8).reshape(1, -1)
    held = dequantise_int4(Int4(*int4_of_rows(kind, rows)))
    np.testing.assert_allclose(held, unpack_rows(kind, rows), rtol=1e-5)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_no_rows_are_no_weights(name):
    kind = BLOCK_TYPES[name]
    empty = np.empty((0, kind.row_bytes(512)), np.uint8)
    assert unpack_rows(kind, empty).size == 0
