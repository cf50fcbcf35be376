"""What is asked of the last stage survives the wire, and nothing else gets through."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import MessageError
from pipeline.protocol.last_stage_inputs import (
    MAX_BIASES,
    MAX_VOCAB,
    Asked,
    asked_from_wire,
    asked_specs,
    asked_to_wire,
    max_draw_bytes,
)
from pipeline.protocol.result_kinds import Result, Want
from pipeline.sampling.draw import Draw, Text, adjust, draw, final
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.sampler import Sampler
from transport.tensor_frames import DType, Tensor, TensorSpec

VOCAB = 50
DRAWN_TWICE = Want(Result.DRAWN, 2)
PARAMS = SamplingParams(
    temperature=0.7, top_k=(1 << 31) - 1, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
    presence_penalty=-0.1, frequency_penalty=0.3, logit_bias={3: 100.0, (1 << 20) - 1: 2.0},
)  # fmt: skip
FULL = Draw(
    PARAMS,
    (0.25, 0.5),
    np.array([3, 49, 0, 49], np.uint32),
    1,
    (7,),
    bytes(range(14)),
)
PLAIN = Draw(SamplingParams(temperature=1.0), (0.125,))
WANTS = (Want.TOKEN, Want(Result.LOGPROBS, 2, 1, 2), DRAWN_TWICE, Want.NOTHING, Want.DRAWN)
ASKED = Asked((1, 2, 3, 49), (FULL, PLAIN))


def draws_of(data):
    return Tensor(TensorSpec(DType.U8, (len(data),)), memoryview(data))


def wire(*draws):
    (tensor,) = asked_to_wire(Asked(draws=draws))
    return bytes(tensor.data)


def test_what_is_asked_survives_the_wire():
    tensors = asked_to_wire(ASKED)
    specs = tuple(tensor.spec for tensor in tensors)
    assert specs == asked_specs(WANTS, specs, 64)
    found = asked_from_wire(WANTS, tensors, VOCAB)
    assert found.token_ids == ASKED.token_ids
    full, plain = found.draws
    assert full.params == PARAMS
    assert full.uniforms == FULL.uniforms
    assert full.text.tolist() == FULL.text.tolist()
    assert full.num_prompt == FULL.num_prompt
    assert full.drafted == FULL.drafted
    assert full.allowed == FULL.allowed
    assert plain.params == PLAIN.params
    assert plain.uniforms == PLAIN.uniforms
    assert (plain.text.size, plain.drafted, plain.allowed) == (0, (), b"")


def test_where_nothing_is_asked_nothing_travels():
    assert asked_to_wire(Asked()) == ()
    assert (
        asked_specs((Want.TOKEN, Want.LOGITS, Want.HIDDEN, Want(Result.LOGPROBS, 1, 3)), (), 9)
        == ()
    )


def test_the_largest_draw_fits_the_limit_exactly():
    params = SamplingParams(logit_bias=dict.fromkeys(range(MAX_BIASES), 1.0))
    text = np.arange(64, dtype=np.uint32)
    how = Draw(params, (0.5, 0.5), text, 64, (1,), bytes(2 * MAX_VOCAB // 8))
    most = max_draw_bytes(1, 2, 64) - 4  # the first row has no token drafted before it
    data = wire(how)
    assert len(data) == most
    for num_bytes, is_taken in ((most, True), (most + 5, False), (0, False)):
        spec = TensorSpec(DType.U8, (num_bytes,))
        assert (asked_specs((DRAWN_TWICE,), (spec,), 64) == (spec,)) is is_taken


def test_every_truncated_or_padded_draw_is_refused():
    data = wire(FULL, PLAIN)
    wants = (DRAWN_TWICE, Want.DRAWN)
    for wrong in [data[:length] for length in range(len(data))] + [data + b"\0"]:
        with pytest.raises(MessageError):
            asked_from_wire(wants, (draws_of(wrong),), VOCAB)


@pytest.mark.parametrize(
    ("offset", "value", "word"),
    [
        (0, np.float64(-1), "temperature"),
        (8, np.float64("nan"), "top_p"),
        (16, np.float64(2), "min_p"),
        (24, np.float64(0), "repetition_penalty"),
        (32, np.float64("inf"), "presence_penalty"),
        (40, np.float64("-inf"), "frequency_penalty"),
        (52, np.uint32((1 << 32) - 1), "too early"),
        (56, np.uint32(5), "4 tokens, 5 of a prompt"),
        (60, np.uint32(MAX_BIASES + 1), "biases"),
        (64, np.uint32(13), "mask"),
        (68, np.float64(1), "0, 1"),
        (68, np.float64("nan"), "0, 1"),
        (84, np.uint32(VOCAB), "outside the vocabulary"),  # drafted
        (88, np.uint32(VOCAB), "outside the vocabulary"),  # of the text
    ],
)
def test_a_draw_that_makes_no_sense_is_refused(offset, value, word):
    data = bytearray(wire(FULL))
    data[offset : offset + value.nbytes] = value.tobytes()
    with pytest.raises(MessageError, match=word):
        asked_from_wire((DRAWN_TWICE,), (draws_of(bytes(data)),), VOCAB)


def test_an_id_to_score_outside_the_vocabulary_is_refused():
    want = Want(Result.LOGPROBS, 1, 0, 1)
    with pytest.raises(MessageError, match="outside the vocabulary"):
        asked_from_wire((want,), asked_to_wire(Asked((VOCAB,))), VOCAB)


@given(st.binary(max_size=200), st.integers(1, 3))
def test_any_bytes_are_draws_or_a_message_error(data, num_rows):
    want = Want(Result.DRAWN, num_rows)
    try:
        found = asked_from_wire((want,), (draws_of(data),), VOCAB)
    except MessageError:
        return
    assert len(found.draws[0].uniforms) == num_rows


@given(st.data())
def test_any_change_of_a_genuine_draw_is_a_draw_or_a_message_error(data):
    changed = bytearray(wire(FULL))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        (how,) = asked_from_wire((DRAWN_TWICE,), (draws_of(bytes(changed)),), VOCAB).draws
    except MessageError:
        return
    assert max([*how.text.tolist(), *how.drafted]) < VOCAB


def test_how_much_is_told_does_not_say_which_tokens_came():
    params = SamplingParams(temperature=1.0, repetition_penalty=1.1, frequency_penalty=0.1)
    again, other = (Sampler(params, (1, 2)) for _ in range(2))
    for token_id in range(3, 40):
        assert len(wire(again.next_draw())) == len(wire(other.next_draw()))
        again.took(7)
        other.took(token_id)


@pytest.mark.parametrize(
    ("params", "seed"),
    [
        (SamplingParams(temperature=1.0), 1),
        (SamplingParams(temperature=1.3, top_p=0.9, min_p=0.01), 2),
        (SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.3), 3),
    ],
)
def test_tokens_drawn_elsewhere_are_as_frequent_as_the_full_rows_distribution(params, seed):
    """Pearson's chi-square, of what crosses the wire both ways against softmax of the row."""
    logits, text = np.random.default_rng(seed).normal(0, 3, 64).astype(np.float32), Text([1, 2, 3])
    num_drawn, counts = 5_000, np.zeros(64)
    for uniform in np.random.default_rng(seed).random(num_drawn):
        sent = asked_to_wire(Asked(draws=(Draw(params, (uniform,), text.ids, 3),)))
        (how,) = asked_from_wire((Want.DRAWN,), sent, 64).draws
        counts[draw(logits, how)] += 1
    row = final(adjust(logits, Draw(params, text=text.ids, num_prompt=3)), params)
    chances = np.exp(row.astype(np.float64) - row.max())
    chances /= chances.sum()
    assert not counts[chances == 0].any()
    # Of what is rare, all together.
    is_rare = chances * num_drawn < 5
    expected = np.append(chances[~is_rare], chances[is_rare].sum()) * num_drawn
    found = np.append(counts[~is_rare], counts[is_rare].sum())
    is_any = expected > 0
    statistic = ((found - expected)[is_any] ** 2 / expected[is_any]).sum()
    degrees = is_any.sum() - 1
    # Five standard deviations above its mean.
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)
