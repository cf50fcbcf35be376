"""The step sent ahead is the one that would have been sent, or none is."""

import pytest

from pipeline.engine.step import FollowUp
from pipeline.errors import LinkLost
from pipeline.orchestrator.step_ahead import Ahead
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StageTiming, StepHeader, StepKind, encode_step
from pipeline.protocol.step_limits import token_ids_to_wire
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
