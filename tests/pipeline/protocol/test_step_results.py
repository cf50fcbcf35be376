"""Results are what their header says, each segment's part where it belongs."""

import numpy as np
import pytest

from pipeline.codecs.registry import make_codec
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Result, Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import CLEAR_SPEC, MAX_LOGPROBS, SessionLimits, token_specs
from pipeline.protocol.step_results import (
    StepResult,
    expected_results,
    max_result_bytes,
    result_to_wire,
    step_result,
)

VOCAB, WIDTH = 7, 4
WANTS = (
    Want.TOKEN,
    Want(Result.HIDDEN, 2),
    Want.NOTHING,
    Want(Result.LOGITS, 2),
    Want(Result.LOGPROBS, 2, 1, 2),
    Want(Result.DRAWN, 1, 2, 1),
    Want(Result.TOKEN, 2),
    Want(Result.LOGPROBS, 1, 0, 1),
)


def header(*wants, kind=StepKind.STEP):
    segments = tuple(Segment(slot, 0, 2) for slot in range(len(wants)))
    return StepHeader(kind, 1, segments, wants)


def test_each_segment_finds_its_part():
    logits = np.arange(2 * VOCAB, dtype=np.float32).reshape(2, VOCAB)
    hidden = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    logprobs = -np.arange(10, dtype=np.float32)
    top_ids = np.arange(4, dtype=np.uint32)
    tensors = result_to_wire(
        [10, 11, 12, 13], logits=logits, hidden=hidden, logprobs=logprobs, top_ids=top_ids
    )
    asked = header(*WANTS)
    assert tuple(tensor.spec for tensor in tensors) == expected_results(asked, VOCAB, WIDTH)
    result = step_result(asked, tensors)
    assert sorted(result.all_ids()) == [0, 1, 2, 3, 10, 11, 12, 13]
    token, rows, whole, scored, drawn, tokens, one = result.segments()
    assert (token.token_ids, drawn.token_ids, tokens.token_ids) == ([10], [11], [12, 13])
    np.testing.assert_array_equal(rows.hidden, hidden)
    np.testing.assert_array_equal(whole.logits, logits)
    assert scored.logprobs.tolist() == [[-0.0, -1, -2], [-3, -4, -5]]
    assert scored.top_ids.tolist() == [[0], [1]]
    assert drawn.logprobs.tolist() == [[-6, -7, -8]]
    assert drawn.top_ids.tolist() == [[2, 3]]
    assert one.logprobs.tolist() == [[-9]]
    assert all(part.logits is None for part in (token, rows, scored, drawn, tokens))


@pytest.mark.parametrize("want", [each for each in WANTS if each], ids=str)
def test_what_nobody_wants_does_not_travel(want):
    sizes = dict.fromkeys(("logits", "hidden", "logprobs", "top_ids"), 0)
    sizes["logits"] = want.rows if want.result is Result.LOGITS else 0
    sizes["hidden"] = want.rows if want.result is Result.HIDDEN else 0
    sizes["logprobs"], sizes["top_ids"] = want.num_logprobs, want.rows * want.top
    arrays = {
        "logits": np.zeros((sizes["logits"], VOCAB), np.float32),
        "hidden": np.zeros((sizes["hidden"], WIDTH), np.float32),
        "logprobs": np.zeros(sizes["logprobs"], np.float32),
        "top_ids": np.zeros(sizes["top_ids"], np.uint32),
    }
    tensors = result_to_wire([0] * want.num_tokens, **arrays)
    assert len(tensors) == 1 + sum(size > 0 for size in sizes.values())
    specs = expected_results(header(want, Want.NOTHING), VOCAB, WIDTH)
    assert tuple(tensor.spec for tensor in tensors) == specs
    (part,) = step_result(header(want, Want.NOTHING), tensors).segments()
    assert len(part.token_ids) == want.num_tokens


def test_plain_tokens_and_what_takes_back_return_what_they_always_did():
    assert expected_results(header(Want.TOKEN, Want.TOKEN), VOCAB, WIDTH) == token_specs(2)
    assert expected_results(header(Want.NOTHING), VOCAB, WIDTH) == token_specs(0)
    back = header(Want.NOTHING, kind=StepKind.TRUNCATE)
    assert expected_results(back, VOCAB, WIDTH) == (CLEAR_SPEC,)
    assert list(StepResult(header(Want.NOTHING), []).segments()) == []


def test_the_most_that_a_step_may_want_is_within_the_limit():
    limits = SessionLimits(2, 4096, 4096, make_codec("F32", WIDTH))
    most = max_result_bytes(limits, VOCAB)
    for want in (
        Want(Result.TOKEN, 4096),
        Want(Result.HIDDEN, 4096),
        Want(Result.LOGITS, limits.max_whole_rows),
        Want(Result.LOGPROBS, 4096, 255, MAX_LOGPROBS // 4096 - 255),
    ):
        specs = expected_results(header(want), VOCAB, WIDTH)
        assert sum(spec.nbytes for spec in specs) <= most
