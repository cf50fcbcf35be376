"""Weights of every stored format pack to the bytes that the layout and the precision mean."""

import numpy as np
import pytest

from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT8, from_floats, to_floats
from pipeline.kernels.huge_pages import aligned
from pipeline.weights.int4 import Int4, dequantise_int4, quantise_int4
from pipeline.weights.quantization import quantise

BLOCK, GROUP, SUPER = 16, 32, 64
SHAPES = [(1, 1), (16, 64), (17, 65), (40, 200), (33, 96), (96, 31), (5, 129)]  # [out, in]
EXTREMES = [0.0, -0.0, 1e-45, -1e-40, 3e38, -3.4e38, np.inf, -np.inf, np.nan, 1e-30, 1e-31, 65504.0]


def padded(array, *multiples):
    widths = [(0, -size % each) for size, each in zip(array.shape, multiples, strict=True)]
    return np.pad(array, widths)


def reference(native, kind, outputs):
    """The packed weight, spelled out: `outputs` [out, in] in a file's format."""
    if kind == native.F32:
        blocks = padded(to_floats(outputs), BLOCK, 1).reshape(-1, BLOCK, outputs.shape[1])
        return np.ascontiguousarray(blocks.transpose(0, 2, 1)).tobytes()
    if kind == native.BF16:
        held = outputs if outputs.dtype == BFLOAT16 else from_floats(to_floats(outputs), BFLOAT16)
        held = padded(held, BLOCK, 2)
        pairs = held.reshape(len(held) // BLOCK, BLOCK, -1, 2)
        return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).tobytes()
    if kind == native.I4:
        return reference_int4(quantise_int4(outputs))
    return reference_int8(*quantise(outputs))


def reference_int8(values, scales):
    num_groups = scales.shape[1]
    levels = padded(values, 1, GROUP).astype(np.int16) + 128  # whole groups, then nothing
    levels = padded(padded(levels.astype(np.uint8), 1, SUPER), BLOCK, 1)
    levels[len(values) :] = 0
    scales = padded(scales, BLOCK, 2)
    levels = levels.reshape(len(levels) // BLOCK, BLOCK, -1, SUPER // 4, 4)
    scales = scales.reshape(len(scales) // BLOCK, BLOCK, -1, 2)
    assert scales.shape[2] == -(-num_groups // 2)
    found = bytearray()
    for block in range(len(levels)):
        for at in range(levels.shape[2]):
            found += np.ascontiguousarray(scales[block, :, at].T).tobytes()
            found += np.ascontiguousarray(levels[block, :, at].transpose(1, 0, 2)).tobytes()
    return bytes(found)


def reference_int4(weights):
    levels = padded(weights.levels, BLOCK, SUPER)
    levels = levels.reshape(len(levels) // BLOCK, BLOCK, -1, 2, 2, GROUP // 8, 4)
    below, above = (levels[:, :, :, :, half].transpose(0, 2, 3, 4, 1, 5) for half in (0, 1))
    words = (below | above << 4).reshape(*below.shape[:2], -1)  # [blocks, supers, bytes]
    sides = []
    for each in weights[1:]:
        of_supers = padded(each, BLOCK, 2).reshape(len(words), BLOCK, -1, 2)
        bits = np.ascontiguousarray(of_supers.transpose(0, 2, 3, 1)).view(np.uint8)
        sides.append(bits.reshape(*words.shape[:2], -1))
    return np.concatenate((*sides, words), axis=2).tobytes()


def stored_weights(dtype, num_out, num_in, seed=0):
    random = np.random.default_rng(seed)
    weights = random.standard_normal((num_out, num_in), np.float32)
    weights *= np.exp2(random.integers(-20, 20, (num_out, 1))).astype(np.float32)
    if weights.size > 200:
        places = random.choice(weights.size, len(EXTREMES), replace=False)
        weights.reshape(-1)[places] = EXTREMES
    return from_floats(weights, dtype)


def stored_format(native, dtype):
    return {
        FLOAT32: native.STORED_F32,
        FLOAT16: native.STORED_F16,
        BFLOAT16: native.STORED_BF16,
    }[dtype]


def strides(matrix):
    return tuple(each // matrix.itemsize for each in matrix.strides)


class Place:
    """A packed weight's memory, between bytes that nothing may write to."""

    def __init__(self, native, kind, num_in, num_out):
        self.size = native.packed_bytes(kind, num_in, num_out)
        self._memory = aligned(np.zeros, (self.size + 64,), np.dtype(np.uint8))
        self._memory[self.size :] = 0xA5
        self.address = self._memory.ctypes.data

    def bytes(self):
        assert (self._memory[self.size :] == 0xA5).all()
        return self._memory[: self.size].tobytes()


def between(cuts, end):
    return zip((0, *cuts), (*cuts, end), strict=True)


def pack(native, kind, outputs, cuts=(), cuts_in=()):
    num_out, num_in = outputs.shape
    place = Place(native, kind, num_in, num_out)
    for first, last in between(cuts, num_out):
        for first_in, last_in in between(cuts_in, num_in):
            part = outputs[first:last, first_in:last_in]
            native.pack(
                kind, place.address, num_in, num_out, stored_format(native, part.dtype), part,
                *strides(part), first, len(part), first_in, part.shape[1],
            )  # fmt: skip
    return place.bytes()


@pytest.fixture(params=[FLOAT32, BFLOAT16, FLOAT16], ids=["from-f32", "from-bf16", "from-f16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_in_out", [False, True], ids=["out-in", "in-out"])
def test_any_stored_floats_pack_to_the_bytes_of_their_precision(
    native, kind, dtype, shape, is_in_out
):
    outputs = stored_weights(dtype, *shape)
    expected = reference(native, kind, outputs)
    laid_out = np.asfortranarray(outputs) if is_in_out else outputs
    assert pack(native, kind, laid_out) == expected


@pytest.mark.parametrize("cuts", [(1,), (16, 32), (7, 8, 30)])
def test_pieces_of_any_height_leave_the_outputs_beside_them_alone(native, kind, dtype, cuts):
    outputs = stored_weights(dtype, 40, 100)
    assert pack(native, kind, outputs, cuts) == reference(native, kind, outputs)


@pytest.mark.parametrize("num_in", [128, 129, 191, 200])
@pytest.mark.parametrize("is_in_out", [False, True], ids=["out-in", "in-out"])
def test_inputs_may_come_in_pieces(native, kind, dtype, num_in, is_in_out):
    outputs = stored_weights(dtype, 40, num_in)
    expected = reference(native, kind, outputs)
    laid_out = np.asfortranarray(outputs) if is_in_out else outputs
    assert pack(native, kind, laid_out, (7, 8), range(SUPER, num_in, SUPER)) == expected


def test_rows_need_neither_be_adjacent_nor_run_either_way(native, kind, dtype):
    every_third = np.ascontiguousarray(stored_weights(dtype, 66, 210))[::2, ::3]
    assert pack(native, kind, every_third) == reference(native, kind, every_third.copy())


def test_threads_share_the_work_without_a_trace(native, kind, dtype):
    outputs = stored_weights(dtype, 200, 300)
    alone = pack(native, kind, outputs)
    native.set_num_threads(3)
    try:
        assert pack(native, kind, outputs) == alone
    finally:
        native.set_num_threads(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_in_out", [False, True], ids=["out-in", "in-out"])
def test_int8_of_a_file_packs_as_it_is(native, shape, is_in_out):
    if "int8" not in native.features():
        pytest.skip("I8 needs vnni")
    values, scales = quantise(stored_weights(FLOAT32, *shape))
    place = Place(native, native.I8, shape[1], shape[0])
    laid_out = np.asfortranarray(values) if is_in_out else values
    for first, last in between([shape[0] // 3], shape[0]):
        for first_in, last_in in between(range(SUPER, shape[1], SUPER), shape[1]):
            part = laid_out[first:last, first_in:last_in]
            own = scales[first:last, first_in // GROUP :]
            native.pack_int8(
                place.address, shape[1], shape[0], part, *strides(part), own, scales.shape[1],
                first, last - first, first_in, last_in - first_in,
            )  # fmt: skip
    assert place.bytes() == reference_int8(values, scales)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_in_out", [False, True], ids=["out-in", "in-out"])
def test_int4_of_a_file_packs_as_it_is(native, shape, is_in_out):
    if "int4" not in native.features():
        pytest.skip("I4 needs vnni")
    random = np.random.default_rng(0)
    sides = (shape[0], -(-shape[1] // GROUP))
    weights = Int4(
        random.integers(0, 16, shape, np.uint8),
        random.standard_normal(sides).astype(FLOAT16),
        (16 * random.random(sides)).astype(FLOAT16),
    )
    place = Place(native, native.I4, shape[1], shape[0])
    laid_out = np.asfortranarray(weights.levels) if is_in_out else weights.levels
    for first, last in between([shape[0] // 3], shape[0]):
        for first_in, last_in in between(range(SUPER, shape[1], SUPER), shape[1]):
            part = laid_out[first:last, first_in:last_in]
            own = [each[first:last, first_in // GROUP :] for each in weights[1:]]
            native.pack_int4(
                place.address, shape[1], shape[0], part, *strides(part), *own, sides[1],
                first, last - first, first_in, last_in - first_in,
            )  # fmt: skip
    assert place.bytes() == reference_int4(weights)
    held = np.empty(shape, np.float32)
    native.unpack(native.I4, place.address, shape[1], shape[0], held)
    np.testing.assert_array_equal(held, dequantise_int4(weights))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_in_out", [False, True], ids=["out-in", "in-out"])
def test_int4_in_rows_is_what_numpy_finds(native, dtype, shape, is_in_out):
    outputs = stored_weights(dtype, *shape)
    expected = quantise_int4(outputs)
    laid_out = np.asfortranarray(outputs) if is_in_out else outputs
    found = Int4(*(np.empty(each.shape, each.dtype) for each in expected))
    stored = stored_format(native, dtype)
    native.quantise_int4(stored, laid_out, *strides(laid_out), shape[1], shape[0], *found)
    for own, each in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, each)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_in_out", [False, True], ids=["out-in", "in-out"])
def test_quantising_in_rows_gives_what_numpy_does(native, dtype, shape, is_in_out):
    outputs = stored_weights(dtype, *shape)
    expected = quantise(outputs)
    laid_out = np.asfortranarray(outputs) if is_in_out else outputs
    values, scales = np.empty(shape, INT8), np.empty(expected[1].shape, BFLOAT16)
    stored = stored_format(native, dtype)
    native.quantise(stored, laid_out, *strides(laid_out), shape[1], shape[0], values, scales)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


@pytest.mark.parametrize("to", [FLOAT32, BFLOAT16], ids=["to-f32", "to-bf16"])
@pytest.mark.parametrize("count", [1, 15, 16, 4099, (1 << 16) + 5])
def test_conversion_is_that_of_numpy_bit_for_bit(native, dtype, to, count):
    values = stored_weights(dtype, 1, count).reshape(-1)
    expected = values if dtype == to else from_floats(to_floats(values), to)
    found = np.zeros(count + 8, to)
    kind = native.F32 if to == FLOAT32 else native.BF16
    native.convert(stored_format(native, dtype), values, kind, found[:count], count)
    assert found[:count].tobytes() == expected.tobytes()
    assert not found[count:].any()


def test_formats_that_cannot_be_are_refused(native):
    place = Place(native, native.F32, 4, 4)
    weights = np.zeros((4, 4), np.float32)
    for stored in (2, 4):
        with pytest.raises(ValueError, match="no such format"):
            native.pack(native.F32, place.address, 4, 4, stored, weights, 4, 1, 0, 4, 0, 4)
    with pytest.raises(ValueError, match="to convert to"):
        native.convert(native.STORED_F32, weights, native.I8, weights, 16)


@pytest.mark.parametrize(
    "place", [(0, 5, 0, 100), (3, 2, 0, 100), (0, 4, 32, 68), (0, 4, 64, 37), (0, 4, 0, 80),
              (0, 4, 0, 0), (0, 4, 128, 1)],
)  # fmt: skip
def test_places_beyond_a_weight_or_amid_a_tile_are_refused(native, place):
    packed = Place(native, native.F32, 100, 4)
    weights = np.zeros((4, 100), np.float32)
    arguments = (packed.address, 100, 4, native.STORED_F32, weights, 100, 1, *place)
    with pytest.raises(ValueError, match="puts"):
        native.pack(native.F32, *arguments)
    assert not any(packed.bytes())
