"""A session outlives its data channels: rewinds, replays, and what was certain."""

import numpy as np
import pytest
import trio

import pipeline.stage.session
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import (
    receive_step,
    send_step,
)
from pipeline.protocol.messages import Broken, Failure, Health, Healthy, Ready, Rewind
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from tests.pipeline.stage.rig import LOOPBACK, failure_of, figures_of, settled
from transport.dial_and_listen import listen
from transport.errors import HandshakeError
from transport.tensor_frames import DType, Tensor, TensorSpec


class Joined:
    """A session whose data channels can be lost and made again."""

    def __init__(self, rig, control, results):
        self.rig, self.control, self.results = rig, control, results

    async def join(self):
        self.upstream, self.downstream, self.gate = await self.rig.join(self.results)
        assert (await self.said(Ready)).epoch == self.rig.epoch

    async def leave(self):
        for channel in (self.upstream, self.downstream):
            await trio.aclose_forcefully(channel)

    async def rewind(self, lengths, **fields):
        """Leave the old channels once the stage has heard of it, not before."""
        self.rig.epoch = bytes([self.rig.epoch[0] + 1]) * 16
        fields = {"data_out": str(self.results.endpoint), **fields}
        await self.control.send(Rewind(epoch=self.rig.epoch, lengths=lengths, **fields))
        await self.control.send(Health(sequence=1))
        heard = await self.said(Healthy | Failure)
        await self.leave()
        return heard

    async def said(self, kind):
        with trio.fail_after(60):
            while not isinstance(message := await self.control.receive(), kind):
                pass
        return message

    async def run(self, header, tensor):
        await send_step(self.upstream, header, (tensor,))
        with trio.fail_after(60):
            _, tensors = await receive_step(self.downstream, self.gate)
        return bytes(tensors[-1].data)


@pytest.fixture
async def joined(rig):
    async with rig.worker():
        with listen(LOOPBACK) as results:
            control = await rig.control()
            await control.send(rig.init(results.endpoint))
            joined = Joined(rig, control, results)
            await joined.join()
            yield joined
            await joined.leave()
            await control.aclose()


def rows(start, count):
    data = np.random.default_rng(5).standard_normal((64, 64), dtype=np.float32)
    part = np.ascontiguousarray(data[start : start + count])
    return Tensor(TensorSpec(DType.F32, part.shape), part.data.cast("B"))


def logits(slot, position, count):
    return StepHeader(StepKind.STEP, position, (Segment(slot, position, count),), (Want.LOGITS,))


def replay(slot, position, count, until=1, want=Want.NOTHING):
    segment = Segment(slot, position, count)
    return StepHeader(StepKind.REPLAY, position, (segment,), (want,), until=until)


async def test_a_session_outlives_its_channels_and_goes_back_to_what_is_certain(joined):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    expected = await joined.run(logits(0, 5, 1), rows(5, 1))
    await joined.run(logits(1, 0, 3), rows(20, 3))
    await trio.aclose_forcefully(joined.upstream)
    broken = await joined.said(Broken)
    assert (broken.epoch, broken.side) == (joined.rig.epoch, "upstream")
    await joined.rewind([5, 0])
    await joined.join()
    figures = await figures_of(joined.control)
    assert (figures.slots_in_use, figures.kv_tokens) == (1, 5)
    # Slot 0 holds what it held; slot 1 was not named, so it begins anew.
    assert await joined.run(logits(0, 5, 1), rows(5, 1)) == expected
    assert await joined.run(logits(1, 0, 5), rows(0, 5))


async def test_a_rewind_interrupts_a_session_that_sees_nothing_wrong(joined):
    expected = await joined.run(logits(0, 0, 5), rows(0, 5))
    await joined.rewind([0, 0])
    await joined.join()
    assert await joined.run(logits(0, 0, 5), rows(0, 5)) == expected


async def test_a_rewind_names_where_the_neighbour_is_now(joined):
    expected = await joined.run(logits(0, 0, 5), rows(0, 5))
    with listen(LOOPBACK) as elsewhere:
        before, joined.results = joined.results, elsewhere
        before.close()
        await joined.rewind([0, 0])
        await joined.join()
        assert await joined.run(logits(0, 0, 5), rows(0, 5)) == expected


async def test_of_several_rewinds_the_last_one_counts(joined):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    await joined.rewind([4, 0])
    await joined.rewind([3, 0])
    await joined.join()
    assert (await figures_of(joined.control)).kv_tokens == 3


async def test_a_channel_of_an_epoch_that_is_over_is_not_let_in(joined):
    stale = joined.rig.epoch
    await joined.rewind([0, 0])
    current, joined.rig.epoch = joined.rig.epoch, stale
    with pytest.raises(HandshakeError):
        await joined.rig.dial_upstream()
    joined.rig.epoch = current
    await joined.join()


async def test_replayed_steps_rebuild_what_a_slot_held_and_answer_nothing(joined):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    expected = await joined.run(logits(0, 5, 1), rows(5, 1))
    await joined.rewind([0, 0])
    await joined.join()
    await send_step(joined.upstream, replay(0, 0, 5), (rows(0, 5),))
    # The next thing to come is the answer of the step behind the replay.
    assert await joined.run(logits(0, 5, 1), rows(5, 1)) == expected


async def test_a_stage_answers_between_long_steps_that_came_together(joined, monkeypatch):
    monkeypatch.setattr(pipeline.stage.session, "LONG_STEP_NS", 0)
    for position in range(20):
        await send_step(joined.upstream, replay(0, position, 1), (rows(position, 1),))
    assert (await figures_of(joined.control)).num_steps <= 5
    await settled(joined.control, num_steps=20)


@pytest.mark.parametrize(
    ("lengths", "fields", "word"),
    [
        ([6, 0], {}, "holds 5 tokens"),
        ([5, 1], {}, "holds 0 tokens"),
        ([5], {}, "names 1 slots"),
        ([5, 0, 0], {}, "names 3 slots"),
        ([5, 0], {"replay_until": 1}, "replay until stage 1"),
        ([5, 0], {"replay_until": 7}, "replay until stage 7"),
        ([5, 0], {"data_out": "10.0.0.5:80"}, "stage 1 may not dial tcp:10.0.0.5:80"),
    ],
)
async def test_a_rewind_that_cannot_be_is_refused_with_the_values(joined, lengths, fields, word):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    heard = await joined.rewind(lengths, **fields)
    failure = heard if isinstance(heard, Failure) else await joined.said(Failure)
    assert word in failure.detail


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (replay(0, 0, 2), "holds 5 tokens"),
        (replay(0, 5, 2, until=0), "until stage 0"),
        (replay(0, 5, 2, until=2), "until stage 2"),
        (replay(0, 5, 2, want=Want.TOKEN), "wants a result"),
        (replay(0, 40, 30), "position 70"),
    ],
)
async def test_a_replay_that_does_not_continue_the_slot_is_refused(joined, header, word):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    await send_step(joined.upstream, header, (rows(0, header.num_tokens),))
    message = await failure_of(joined.control)
    assert word in message.detail


def copy(source, target, count):
    pair = (Segment(source, 0, count), Segment(target, 0, count))
    return StepHeader(StepKind.COPY, 99, pair, (Want.NOTHING,) * 2)


EMPTY = Tensor(TensorSpec(DType.U32, (0,)), memoryview(b""))


async def test_a_copied_slot_goes_on_as_its_source_would_and_outlives_it(joined):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    assert await joined.run(copy(0, 1, 4), EMPTY) == b""
    expected = await joined.run(logits(0, 5, 1), rows(5, 1))
    again = await joined.run(logits(1, 4, 2), rows(4, 2))
    assert again[-len(expected) :] == expected
    await joined.rewind([0, 5])
    await joined.join()
    assert (await figures_of(joined.control)).kv_tokens == 5
    assert await joined.run(logits(1, 5, 1), rows(5, 1)) == expected


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (copy(0, 1, 6), "slot 0 holds 5 tokens"),
        (copy(1, 0, 1), "slot 1 holds 0 tokens"),
        (copy(0, 2, 5), "copies slot 0 to 2 of 2"),
        (copy(0, 1, 65), "the context is 64"),
    ],
)
async def test_a_copy_that_cannot_be_is_refused(joined, header, word):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    await send_step(joined.upstream, header, (EMPTY,))
    assert word in (await failure_of(joined.control)).detail


async def test_nothing_is_copied_to_a_slot_that_holds_something(joined):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    await joined.run(logits(1, 0, 1), rows(0, 1))
    await send_step(joined.upstream, copy(0, 1, 5), (EMPTY,))
    assert "slot 1 holds 1 tokens" in (await failure_of(joined.control)).detail
