"""The step sent ahead is the one that would have been sent, or none is."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.engine.step import FollowUp
from pipeline.errors import LinkLost
from pipeline.orchestrator.step_ahead import Ahead
from pipeline.protocol.batch import Segment
from pipeline.protocol.last_stage_inputs import Asked
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StageTiming, StepHeader, StepKind, encode_step
from pipeline.protocol.step_limits import step_tensors, token_ids_to_wire
from pipeline.sampling.draw import Draw
from pipeline.sampling.params import SamplingParams
from transport.tensor_frames import Frame, FrameKind, encode_frame

TIMINGS = (StageTiming(1, 2, 3), StageTiming(1 << 40, 5, 6))


def header(step, position, **changes):
    fields = {"kind": StepKind.STEP, "step": step, "segments": (Segment(3, position, 1),)}
    return StepHeader(**(fields | {"wants": (Want.TOKEN,)} | changes))


def encoded(step, *token_ids):
    frame = Frame(FrameKind.DATA, encode_step(step), (token_ids_to_wire(token_ids),))
    return memoryview(encode_frame(frame)[0])


FOLLOW_UP = FollowUp(header(7, 40), header(8, 41), frozenset({2, 5}))


@pytest.fixture
def ahead():
    made = Ahead(num_stages=2)
    made.prepare(FOLLOW_UP)
    return made


def test_the_step_sent_ahead_is_the_one_that_follows_with_the_token_that_came(ahead):
    for step, token_id in enumerate((11, 0, 999), 7):
        due, following = header(step, 33 + step), header(step + 1, 34 + step)
        ahead.prepare(FollowUp(due, following, frozenset({2})))
        assert ahead.is_prepared
        form = ahead.follow(encoded(due._replace(timings=TIMINGS), token_id), vocab_size=1000)
        assert bytes(form.plain) == encoded(following, token_id)
        assert not ahead.is_prepared
        assert ahead.has_sent(following)
        assert not ahead.has_sent(following)


@pytest.mark.parametrize("text", [(), (4, 4, 9)])
@pytest.mark.parametrize("is_sound", [True, False])
def test_a_mask_is_sent_with_the_token_that_it_stands_behind(text, is_sound):
    """`is_sound`: whether the mask is of the size for which room was left."""
    due, following = (header(step, 40 + step, wants=(Want.DRAWN,)) for step in (7, 8))
    num_bytes = 4 if is_sound else 5

    def behind(token_id):
        ids = np.array([*text[:-1], token_id] if text else [], np.uint32)
        mask = bytes([token_id] * num_bytes)
        return Draw(SamplingParams(), (0.25,), ids, len(text[:1]), allowed=mask)

    layout = replace(behind(0), allowed=bytes(4))
    ahead = Ahead(num_stages=2)
    ahead.prepare(FollowUp(due, following, frozenset({2}), layout, behind))
    form = ahead.follow(encoded(due._replace(timings=TIMINGS), 11), vocab_size=32)
    if not is_sound:
        assert form is None
        assert not ahead.has_sent(following)
        return
    tensors = step_tensors(following, (11,), Asked(draws=(behind(11),)))
    frame = Frame(FrameKind.DATA, encode_step(following), tensors)
    assert bytes(form.plain) == encode_frame(frame)[0]
    assert ahead.has_sent(following)


@pytest.mark.parametrize(
    "result",
    [
        encoded(FOLLOW_UP.due._replace(timings=TIMINGS), 5),  # an end
        encoded(FOLLOW_UP.due._replace(timings=TIMINGS), 1000),  # outside the vocabulary
        encoded(FOLLOW_UP.due._replace(timings=TIMINGS), 11, 12),
        encoded(FOLLOW_UP.due, 11),
        encoded(FOLLOW_UP.due._replace(timings=(*TIMINGS, TIMINGS[0])), 11),
        encoded(header(6, 40, timings=TIMINGS), 11),
        encoded(header(7, 39, timings=TIMINGS), 11),
        encoded(header(7, 40, timings=TIMINGS, wants=(Want.LOGITS,)), 11),
        encoded(header(7, 40, timings=TIMINGS, kind=StepKind.REPLAY), 11),
        encoded(header(7, 40, timings=TIMINGS, segments=(Segment(2, 40, 1),)), 11),
        memoryview(b""),
    ],
)
def test_nothing_is_sent_ahead_for_another_result_than_was_due(ahead, result):
    assert ahead.follow(result, vocab_size=1000) is None
    assert not ahead.is_prepared
    assert not ahead.has_sent(FOLLOW_UP.header)


def test_nothing_is_sent_ahead_twice_or_unprepared(ahead):
    result = encoded(FOLLOW_UP.due._replace(timings=TIMINGS), 11)
    assert ahead.follow(result, 1000) is not None
    assert ahead.follow(result, 1000) is None
    ahead.prepare(FOLLOW_UP)  # as by a second run over the same channels
    assert ahead.follow(result, 1000) is None
    with pytest.raises(LinkLost, match="step 9"):
        ahead.has_sent(header(9, 42))
    ahead.prepare(None)
    assert ahead.follow(result, 1000) is None


async def test_steps_leave_ahead_over_channels_that_nobody_waits_for_in_place(
    deployment, monkeypatch
):
    """As for a server, whose other tasks need their turn."""
    sent = []

    class Watched(Ahead):
        def follow(self, plain, vocab_size):
            form = super().follow(plain, vocab_size)
            sent.append(form is not None)
            return form

    monkeypatch.setattr("pipeline.orchestrator.step_link.Ahead", Watched)
    async with deployment.running() as (manifest, results):
        tokens = await deployment.generate(manifest, results, num_tokens=12)
    assert tokens == deployment.reference(12)
    assert sum(sent) >= 9  # of eleven: a frame that comes in two pieces is left to `receive`
