"""The joined stages as the orchestrator sees them: when it takes their links for hung."""

from types import SimpleNamespace

import numpy as np
import pytest
import trio

import pipeline.orchestrator.step_link
from pipeline.engine.scheduler import Limits, Step
from pipeline.errors import MessageError
from pipeline.orchestrator.remote_pipeline import Pipeline, PipelineOptions
from pipeline.orchestrator.step_link import StepLink
from pipeline.protocol.messages import StepHeader, StepKind, Want
from pipeline.protocol.segments import Segment
from pipeline.protocol.steps import logits_to_wire, token_ids_to_wire

STEP = Step(StepHeader(StepKind.STEP, 0, (Segment(0, 0, 1),), (Want.TOKEN,)), (1,), (0,))
REPLAY = Step(StepHeader(StepKind.REPLAY, 0, (Segment(0, 0, 1),), (Want.NOTHING,)), (1,), ())


@pytest.fixture
async def joined(nursery, monkeypatch):
    """A pipeline whose links take every step, and give a result when asked."""

    async def send(channel, header, tensors):
        await trio.lowlevel.checkpoint()

    async def receive(channel, gate):
        await trio.lowlevel.checkpoint()
        return STEP.header, (token_ids_to_wire([1]),)

    monkeypatch.setattr(pipeline.orchestrator.step_link, "send_step", send)
    monkeypatch.setattr(pipeline.orchestrator.step_link, "receive_step", receive)
    options = PipelineOptions(Limits(1, 64), 10, hang_seconds=10)
    manifest = SimpleNamespace(stages=(None,))
    joined = Pipeline(manifest, options, None, None, None, nursery)
    joined._link = StepLink(None, None, None, num_stages=1, vocab_size=2)
    yield joined
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("num_logits", [1, 3])
async def test_logits_of_another_vocabulary_are_refused(joined, monkeypatch, num_logits):
    async def receive(channel, gate):
        await trio.lowlevel.checkpoint()
        logits = np.zeros((1, num_logits), np.float32)
        return STEP.header, (token_ids_to_wire([1]), logits_to_wire(logits))

    monkeypatch.setattr(pipeline.orchestrator.step_link, "receive_step", receive)
    await joined.send(STEP)
    with pytest.raises(MessageError, match="vocabulary has 2"):
        await joined.receive()


async def test_a_step_that_nobody_moves_means_that_a_link_hangs(joined, autojump_clock):
    await joined.send(STEP)
    await trio.sleep(21)
    assert joined.is_broken


async def test_a_step_sent_late_in_a_quiet_time_is_not_overdue(joined, autojump_clock):
    await trio.sleep(9)
    await joined.send(STEP)
    await trio.sleep(5)
    assert not joined.is_broken


async def test_without_steps_under_way_nothing_has_to_move(joined, autojump_clock):
    await joined.send(REPLAY)
    await joined.send(STEP)
    await joined.receive()
    await trio.sleep(100)
    assert not joined.is_broken


async def test_where_any_stage_still_computes_no_link_hangs(joined, autojump_clock):
    figures = SimpleNamespace(num_steps=0)
    joined._stages = {0: SimpleNamespace(figures=figures)}
    await joined.send(STEP)
    for _ in range(20):
        await trio.sleep(5)
        figures.num_steps += 1  # of a long replay, say
    assert not joined.is_broken
