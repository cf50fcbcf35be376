"""A stage as the orchestrator sees it, whatever becomes of it."""

from types import SimpleNamespace

import pytest
import trio
import trio.testing

import pipeline.orchestrator.stage_watch
from pipeline.errors import StageHung, StageLost
from pipeline.orchestrator.stage_watch import Expectation, RemoteStage
from pipeline.protocol.messages import Done, Health, Healthy, Rewind, StageFigures, Start

NOTHING = StageFigures(**dict.fromkeys(StageFigures.model_fields, 0))


class Control:
    """A control channel; what the stage says is put into `said`."""

    channel = None

    def __init__(self):
        self.heard = []
        self.say, self.said = trio.open_memory_channel(100)
        self.is_answering = True

    async def send(self, message):
        await trio.lowlevel.checkpoint()
        self.heard.append(message)
        if isinstance(message, Health) and self.is_answering:
            self.say.send_nowait(Healthy(sequence=message.sequence, figures=NOTHING))

    async def receive(self):
        return await self.said.receive()


@pytest.fixture
async def control():
    return Control()


@pytest.fixture
async def stage(control):
    expected = Expectation(SimpleNamespace(stage_idx=1, precision=None), is_last=True)
    return RemoteStage(expected, control, lambda text: None, lambda error: None)


async def test_a_stage_that_was_not_told_to_begin_has_not_begun(stage, control):
    opening = Rewind(epoch=bytes(16), lengths=[0], data_out="127.0.0.1:9011")
    with trio.CancelScope() as scope:
        scope.cancel()  # as by the loss of another stage
        await stage.begin(opening)
    assert control.heard == []
    assert not stage.has_begun
    await stage.begin(opening)
    assert stage.has_begun


async def test_a_channel_that_a_failed_send_has_closed_is_a_lost_stage(stage, control):
    async def close():
        await trio.testing.wait_all_tasks_blocked()
        control.said.close()  # ends the waiting receive with ClosedResourceError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        with pytest.raises(StageLost, match="stage 1"):
            await stage.watch(60)


async def test_a_silent_stage_is_hung_and_one_that_answers_is_not(stage, control, autojump_clock):
    with trio.move_on_after(100) as patience:
        await stage.watch(3)
    assert patience.cancelled_caught
    control.is_answering = False
    began = trio.current_time()
    with pytest.raises(StageHung, match="3 s"):
        await stage.watch(3)
    assert 3 <= trio.current_time() - began <= 5


async def test_time_in_which_this_process_was_stopped_is_not_the_stages_silence(
    stage, mock_clock, monkeypatch
):
    monkeypatch.setattr(pipeline.orchestrator.stage_watch, "HEALTH_SECONDS", 1.0)

    async def let_time_pass():
        for seconds in (1, 1, 600, 1, 1):
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(seconds)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(let_time_pass)
        await stage.watch(3)


async def test_what_a_stage_was_not_told_for_a_loss_it_is_told_later_in_order(stage, control):
    notices = [Start(request_id=1, slot=0), Done(request_id=1), Start(request_id=2, slot=0)]
    stage.note(notices[:2])
    with trio.CancelScope() as scope:
        scope.cancel()
        await stage.tell()
    assert control.heard == []
    stage.note(notices[2:])
    await stage.tell()
    await stage.tell()
    assert control.heard == notices
