"""A want has one form on the wire, and a step wants no more than it has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.codecs.registry import make_codec
from pipeline.errors import MessageError
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Result, Want, want_from_wire
from pipeline.protocol.step_header import StepHeader, StepKind, decode_step, encode_step
from pipeline.protocol.step_limits import (
    CLEAR_SPEC,
    MAX_LOGPROBS,
    WHOLE_ROWS,
    SessionLimits,
    check_header,
    expected_inputs,
    token_specs,
)
from pipeline.protocol.step_results import expected_results
from transport.tensor_frames import DType, TensorSpec

LIMITS = SessionLimits(2, 4096, 2048, make_codec("F32", 8))
WANTS = [
    Want.NOTHING, Want.TOKEN, Want.LOGITS, Want.HIDDEN, Want.DRAWN,
    Want(Result.TOKEN, 5), Want(Result.LOGPROBS, 9, 20, 3), Want(Result.LOGPROBS, 9, 0, 1),
    Want(Result.LOGPROBS, 9, 1, 0), Want(Result.DRAWN, 4, 20, 1), Want(Result.DRAWN, 1, 0, 1),
]  # fmt: skip


def step(want, num_tokens=9, kind=StepKind.STEP):
    return StepHeader(kind, 1, (Segment(0, 3, num_tokens),), (want,))


@pytest.mark.parametrize("want", WANTS, ids=str)
def test_a_want_survives_the_wire(want):
    assert decode_step(encode_step(step(want))).wants == (want,)
    assert bool(want) is (want != Want.NOTHING)


@pytest.mark.parametrize(
    "fields",
    [
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (1, 0, 0, 0),
        (1, 1, 1, 0),
        (2, 1, 0, 1),
        (3, 0, 0, 0),
        (4, 1, 0, 0),
        (4, 0, 1, 0),
        (5, 1, 0, 2),
        (5, 1, 1, 0),
        (6, 1, 0, 0),
        (255, 0, 0, 0),
    ],
    ids=str,
)
def test_a_want_that_says_nothing_sensible_is_refused(fields):
    with pytest.raises(MessageError, match="want"):
        want_from_wire(*fields)


@given(st.integers(0, 255), st.integers(0, 9), st.integers(0, 255), st.integers(0, 9))
def test_any_fields_are_a_want_of_that_form_or_a_message_error(result, rows, top, num_ids):
    try:
        want = want_from_wire(result, rows, top, num_ids)
    except MessageError:
        return
    assert tuple(want) == (result, rows, top, num_ids)


def test_the_header_of_an_ordinary_step_is_as_short_as_can_be():
    assert len(encode_step(step(Want.TOKEN, 1))) == 16 + 16


@pytest.mark.parametrize(
    ("want", "num_tokens", "word"),
    [
        (Want(Result.TOKEN, 3), 2, "wants 3 rows"),
        (Want(Result.LOGITS, 2 * WHOLE_ROWS + 1), 200, "the limits are"),
        (Want(Result.DRAWN, 2 * WHOLE_ROWS + 1), 200, "the limits are"),
        (Want(Result.LOGPROBS, 2000, 255, 300), 2000, f"{MAX_LOGPROBS}"),
    ],
)
def test_a_step_that_wants_more_than_there_may_be_is_refused(want, num_tokens, word):
    with pytest.raises(MessageError, match=word):
        check_header(step(want, num_tokens), LIMITS)


@pytest.mark.parametrize("want", WANTS[1:], ids=str)
def test_what_replays_or_takes_back_wants_nothing(want):
    with pytest.raises(MessageError, match="wants"):
        check_header(step(want, kind=StepKind.REPLAY), LIMITS)
    with pytest.raises(MessageError, match="wants"):
        check_header(step(want, 0, kind=StepKind.TRUNCATE), LIMITS)


def test_a_step_that_takes_back_names_how_much_is_kept():
    back = step(Want.NOTHING, 0, kind=StepKind.TRUNCATE)
    check_header(back, LIMITS)
    assert expected_inputs(back, LIMITS, is_first=False) == (CLEAR_SPEC,)
    with pytest.raises(MessageError, match="4 tokens"):
        check_header(step(Want.NOTHING, 4, kind=StepKind.TRUNCATE), LIMITS)


def copying(*pairs, want=Want.NOTHING):
    segments = tuple(segment for pair in pairs for segment in pair)
    return StepHeader(StepKind.COPY, 0, segments, (want,) * len(segments))


def test_a_step_that_copies_names_slots_in_pairs_and_brings_no_rows():
    whole = LIMITS.max_seq_len
    header = copying((Segment(0, 0, whole), Segment(1, 0, whole)))
    check_header(header, LIMITS)
    assert expected_inputs(header, LIMITS, is_first=True) == (CLEAR_SPEC,)
    assert expected_results(header, 1000, 64) == (CLEAR_SPEC,)


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (copying(), "copies 0 segments"),
        (copying((Segment(0, 0, 5),)), "copies 1 segments"),
        (copying((Segment(0, 0, 5), Segment(1, 0, 5)), want=Want.TOKEN), "wants a result"),
        (copying((Segment(0, 0, 5), Segment(0, 0, 5))), "slot 0 to 0"),
        (copying((Segment(0, 0, 5), Segment(2, 0, 5))), "slot 0 to 2 of 2"),
        (copying((Segment(2, 0, 5), Segment(0, 0, 5))), "slot 2 to 0 of 2"),
        (copying((Segment(0, 0, 5), Segment(1, 0, 4))), "5 tokens at position 0 as 4 at 0"),
        (copying((Segment(0, 1, 5), Segment(1, 1, 5))), "position 1"),
        (copying((Segment(0, 0, 5), Segment(1, 3, 5))), "as 5 at 3"),
        (copying((Segment(0, 0, 0), Segment(1, 0, 0))), "copies 0 tokens"),
        (
            copying(
                *[(Segment(0, 0, LIMITS.max_seq_len + 1), Segment(1, 0, LIMITS.max_seq_len + 1))]
            ),
            "the context is",
        ),
        (copying(*[(Segment(0, 0, 5), Segment(1, 0, 5))] * 2), "to a slot twice"),
    ],
)
def test_a_copy_that_cannot_be_is_refused(header, word):
    with pytest.raises(MessageError, match=word):
        check_header(header, LIMITS)


@pytest.mark.parametrize("is_first", [True, False])
def test_what_a_stage_takes_is_rows_and_what_is_asked_of_the_last(is_first):
    rows = token_specs(9) if is_first else LIMITS.codec.specs(9)
    for want in WANTS:
        asked = ()
        if want.num_given:
            asked = (TensorSpec(DType.U32, (want.num_given,)),)
        if want.result is Result.DRAWN:
            asked = (TensorSpec(DType.U8, (200,)),)
        found = expected_inputs(step(want), LIMITS, is_first=is_first, declared=(*rows, *asked))
        assert found == (*rows, *asked)
