"""Activations on the wire: what each codec keeps, refuses, and costs its neighbours in a batch."""

from functools import partial

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.agreement.manifest import ActivationSpec
from pipeline.codecs.registry import CODECS, make_codec
from pipeline.codecs.rotated_int5 import RotatedInt5
from pipeline.codecs.rotated_int8 import GROUP, INT8_MAX, MAX_SCALE, WHOLE, RotatedInt8
from pipeline.codecs.rotation import SIGNS_DOMAIN, Rotation, cosines, hadamard, signs
from pipeline.errors import MessageError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import StepGate
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind, encode_step
from pipeline.protocol.step_limits import SessionLimits, expected_inputs, token_ids_to_wire
from pipeline.stage.session_admission import expect_step
from pipeline.stage.step_executor import StageCore
from transport.errors import FrameError
from transport.tensor_frames import DType, Tensor, TensorSpec

WIDTHS = (8, 9, 24, 576, 768, 896)


def rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Like a model's: a few elements a hundred times larger than the rest."""
    found = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    found[:, 3] *= 100
    found[:, -1] *= 300
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_the_rotation_is_the_matrix_that_is_written_down(width):
    odd = width // (width & -width)
    kronecker = np.kron(cosines(odd), hadamard(width // odd))
    matrix = kronecker * signs(width)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-6)
    found = Rotation(width).apply(np.eye(width, dtype=np.float32))
    np.testing.assert_allclose(found, matrix.T, atol=1e-6)


def test_the_signs_are_those_of_the_named_stream():
    assert SIGNS_DOMAIN == b"veilpipe-activation-rotation/1"
    # printf veilpipe-activation-rotation/1 | openssl dgst -shake256 -xoflen 2 says 7007
    assert signs(16).tolist() == [1, 1, 1, 1, -1, -1, -1, 1, -1, -1, -1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("width", WIDTHS)
def test_undoing_the_rotation_gives_the_rows_back(width):
    array = rows(5, width)
    rotation = Rotation(width)
    np.testing.assert_allclose(rotation.undo(rotation.apply(array)), array, rtol=1e-4, atol=1e-3)


def test_a_width_whose_matrix_would_be_huge_has_no_rotation():
    with pytest.raises(ValueError, match="width 4094: its odd factor is 2047"):
        Rotation(4094)


@pytest.mark.parametrize("name", CODECS)
def test_a_row_arrives_the_same_bit_for_bit_in_any_company(name):
    codec = make_codec(name, 48)
    hidden = rows(17, 48)
    together = codec.decode(codec.encode(hidden))
    for index in (0, 7, 16):
        alone = codec.decode(codec.encode(hidden[index : index + 1].copy()))
        np.testing.assert_array_equal(alone[0], together[index])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_codec_writes_exactly_the_tensors_that_are_expected(name, count):
    codec = make_codec(name, 48)
    tensors = codec.encode(rows(count, 48))
    assert tuple(tensor.spec for tensor in tensors) == codec.specs(count)
    assert all(len(tensor.data) == tensor.spec.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", CODECS)
def test_the_largest_step_fits_the_limit_exactly(name):
    codec = make_codec(name, 48)
    tensors = codec.encode(rows(32, 48))
    most = sum(len(tensor.data) for tensor in tensors)
    assert SessionLimits(2, 64, 32, codec).max_row_bytes == most


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_plain_exactly_where_rows_travel_as_they_are(name):
    codec, hidden = make_codec(name, 48), rows(3, 48)
    (first, *_) = codec.encode(hidden)
    assert codec.name == name
    assert codec.is_plain_f32 == (bytes(first.data) == hidden.tobytes())


@pytest.mark.parametrize("make", [RotatedInt8, RotatedInt5])
def test_a_rotated_row_is_off_by_at_most_half_a_step_per_rotated_element(make):
    hidden = rows(9, 768)
    codec = make(768)
    tensors = codec.encode(hidden)
    scales = np.frombuffer(tensors[2].data, "<f4")
    rotation = Rotation(768)
    error = codec.decode(tensors) - hidden
    # A small allowance for float32 on rows with elements of several hundred.
    assert (abs(rotation.apply(error)) <= scales[:, None] * 0.51 + 1e-3).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_groups_of_small_elements_have_steps_of_their_own(width):
    rotated = np.full((1, width), 1e-2, np.float32)
    rotated[0, 0] = 1.0
    hidden = Rotation(width).undo(rotated)
    codec = RotatedInt8(width)
    error = Rotation(width).apply(codec.decode(codec.encode(hidden)) - hidden)
    others = np.arange(width) % (2 * -(-width // (2 * GROUP))) > 0
    # a sixteenth of half the row's step, but where the greatest element is
    assert abs(error[0, others]).max(initial=0) <= 0.51 / WHOLE / INT8_MAX
    assert abs(error).max() <= 0.51 / INT8_MAX


def test_two_groups_share_a_byte_and_their_elements_take_turns():
    tensors = (
        Tensor(TensorSpec(DType.I8, (1, 9)), memoryview(bytes([16] * 9))),
        Tensor(TensorSpec(DType.U8, (1, 2)), memoryview(bytes([0x10, 0x32]))),
        Tensor(TensorSpec(DType.F32, (1,)), memoryview(np.array([8], "<f4").tobytes())),
    )
    expected = Rotation(9).undo(np.array([[8, 16, 24, 32, 8, 16, 24, 32, 8]], np.float32))
    np.testing.assert_array_equal(RotatedInt8(9).decode(tensors), expected)


def test_fractions_of_a_step_make_normal_rows_nearly_twice_as_close():
    hidden = np.random.default_rng(0).standard_normal((64, 576)).astype(np.float32)
    codec = RotatedInt8(576)
    rotated = Rotation(576).apply(hidden)
    steps = abs(rotated).max(axis=1, keepdims=True) / INT8_MAX
    alone = np.rint(rotated / steps) * steps - rotated
    error = codec.decode(codec.encode(hidden)) - hidden
    assert np.linalg.norm(error) < 0.6 * np.linalg.norm(alone)


def test_the_rotation_makes_int8_several_times_closer_where_there_are_outliers():
    hidden = rows(16, 768)
    rotated = RotatedInt8(768)
    steps = abs(hidden).max(axis=-1, keepdims=True) / INT8_MAX
    plain_error = np.rint(hidden / steps) * steps - hidden
    error = rotated.decode(rotated.encode(hidden)) - hidden
    assert np.linalg.norm(error) < np.linalg.norm(plain_error) / 3


def test_rows_of_zeros_arrive_as_zeros():
    codec = RotatedInt8(24)
    assert not codec.decode(codec.encode(np.zeros((2, 24), np.float32))).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_rows_that_are_not_finite_are_not_sent(value):
    hidden = np.zeros((2, 24), np.float32)
    hidden[1, 5] = value
    with pytest.raises(MessageError, match="finite"):
        RotatedInt8(24).encode(hidden)


def fractions(num_rows: int, width: int) -> Tensor:
    """Every group's is one."""
    row = b"\xff" * -(-width // (2 * GROUP))
    return Tensor(TensorSpec(DType.U8, (num_rows, len(row))), memoryview(row * num_rows))


def int5_row(elements: list[int], behind: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A row of numbers 0 to 31 as RotatedInt5 lays it out, with a scale of one."""
    whole = sum(value << 5 * index for index, value in enumerate([*elements, behind]))
    num_bytes = -(-5 * len(elements) // 8)
    return (
        Tensor(
            TensorSpec(DType.U8, (1, num_bytes)), memoryview(whole.to_bytes(num_bytes, "little"))
        ),
        fractions(1, len(elements)),
        Tensor(TensorSpec(DType.F32, (1,)), memoryview(np.ones(1, "<f4").tobytes())),
    )


def test_five_bits_an_element_follow_each_other_lowest_first():
    elements = [index % 31 for index in range(9)]
    expected = Rotation(9).undo(np.array([elements], np.float32) - 15)
    np.testing.assert_array_equal(RotatedInt5(9).decode(int5_row(elements)), expected)
    # the same row's scale comes out as one only where every group has the greatest magnitude
    row = Rotation(9).undo(np.array([[3, -15, 15, 0, 1, 7, 2, -15, 15]], np.float32))
    packed = RotatedInt5(9).encode(row)
    assert bytes(packed[0].data) == bytes(int5_row([18, 0, 30, 15, 16, 22, 17, 0, 30])[0].data)


def test_five_bits_that_no_encoder_writes_are_refused():
    RotatedInt5(9).decode(int5_row([30] * 9))
    for tensors in (int5_row([31] + [0] * 8), int5_row([0] * 9, behind=1)):
        with pytest.raises(MessageError, match="5 bits"):
            RotatedInt5(9).decode(tensors)


@pytest.mark.parametrize(
    "scale", [float("nan"), float("inf"), -1.0, 0.0, 1e-42, MAX_SCALE * 2], ids=str
)
def test_a_scale_that_no_encoder_writes_is_refused(scale):
    scales = np.array([1.0, scale], "<f4")
    tensors = (
        Tensor(TensorSpec(DType.I8, (2, 24)), memoryview(bytes(48))),
        fractions(2, 24),
        Tensor(TensorSpec(DType.F32, (2,)), memoryview(scales.tobytes())),
    )
    with pytest.raises(MessageError, match="finite"):
        RotatedInt8(24).decode(tensors)


def test_the_largest_scale_decodes_to_finite_numbers():
    scales = np.array([MAX_SCALE], "<f4")
    tensors = (
        Tensor(TensorSpec(DType.I8, (1, 768)), memoryview(b"\x80" * 768)),
        fractions(1, 768),
        Tensor(TensorSpec(DType.F32, (1,)), memoryview(scales.tobytes())),
    )
    assert np.isfinite(RotatedInt8(768).decode(tensors)).all()


def new_limits(name: str) -> SessionLimits:
    return SessionLimits(4, 128, 64, make_codec(name, 64))


@pytest.fixture(scope="module")
def shards(tiny_model):
    config = load_config(tiny_model)
    return [
        load_shard(tiny_model, config, start, end, expected_hashes=None)
        for start, end in ((0, 1), (1, 3), (3, 4))
    ]


def logits_of(shards, codec: str, prompts) -> np.ndarray:
    """Logits of each prompt's last token, all prompts in one step."""
    cores = [StageCore(shard, new_limits(codec)) for shard in shards]
    segments = tuple(Segment(slot, 0, len(prompt)) for slot, prompt in enumerate(prompts))
    header = StepHeader(StepKind.STEP, 0, segments, (Want.LOGITS,) * len(prompts))
    tensors = (token_ids_to_wire([token for prompt in prompts for token in prompt]),)
    for core in cores:
        specs = tuple(tensor.spec for tensor in tensors)
        assert specs == expected_inputs(header, core.limits, is_first=core.shard.is_first)
        tensors = core.step(header, tensors)
    return np.frombuffer(tensors[1].data, "<f4").reshape(tensors[1].spec.shape)


PROMPTS = ([72, 101, 108, 108, 111], [1, 2, 3], [200, 7, 9, 31, 8, 100, 50])


@pytest.mark.parametrize(
    ("codec", "tolerance"), [("F16", 2e-3), ("BF16", 1e-2), ("I8", 2e-2), ("I5", 2e-1)]
)
def test_three_stages_lose_little_on_a_smaller_wire(shards, codec, tolerance):
    exact = logits_of(shards, "F32", PROMPTS)
    found = logits_of(shards, codec, PROMPTS)
    assert not np.array_equal(found, exact)
    assert np.linalg.norm(found - exact) < tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_mate_changes_no_logit_whatever_the_wire(shards, codec):
    together = logits_of(shards, codec, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        other = [[5] * 11, prompt, [9, 9]]
        np.testing.assert_array_equal(logits_of(shards, codec, other)[1], together[index])


INT8, FRACTIONS = TensorSpec(DType.I8, (3, 64)), TensorSpec(DType.U8, (3, 8))


@pytest.mark.parametrize(
    "specs",
    [
        (INT8, FRACTIONS),
        (INT8, TensorSpec(DType.F32, (3,))),
        (INT8, FRACTIONS, TensorSpec(DType.F32, (2,))),
        (INT8, FRACTIONS, TensorSpec(DType.F32, (3, 1))),
        (INT8, FRACTIONS, TensorSpec(DType.F16, (3,))),
        (INT8, TensorSpec(DType.U8, (3, 7)), TensorSpec(DType.F32, (3,))),
        (TensorSpec(DType.I8, (4, 64)), TensorSpec(DType.U8, (4, 8)), TensorSpec(DType.F32, (4,))),
        (TensorSpec(DType.I8, (3, 65)), FRACTIONS, TensorSpec(DType.F32, (3,))),
        (TensorSpec(DType.F32, (3, 64)),),
        (TensorSpec(DType.F32, (3,)), FRACTIONS, INT8),
    ],
    ids=str,
)
def test_an_int8_step_with_other_tensors_is_refused_before_it_is_stored(specs):
    agreed = new_limits("I8")
    header = StepHeader(StepKind.STEP, 7, (Segment(0, 0, 3),), (Want.TOKEN,))
    gate = StepGate(agreed, partial(expect_step, limits=agreed, stage_idx=1, num_stages=2))
    gate.check(encode_step(header), agreed.codec.specs(3))
    with pytest.raises(FrameError, match="step 7 carries"):
        gate.check(encode_step(header), specs)


def test_a_manifest_may_not_ask_for_a_codec_that_there_is_not():
    with pytest.raises(ValidationError, match="'F64'; use F32, F16, BF16, I8, I5"):
        ActivationSpec(dtype="F64", hidden_dim=576, max_seq_len=8)


def test_a_manifest_may_not_ask_for_a_rotation_that_would_be_huge():
    ActivationSpec(dtype="I8", hidden_dim=576, max_seq_len=8)
    ActivationSpec(dtype="BF16", hidden_dim=4094, max_seq_len=8)
    with pytest.raises(ValidationError, match="odd factor is 2047"):
        ActivationSpec(dtype="I8", hidden_dim=4094, max_seq_len=8)
