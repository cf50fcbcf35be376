"""The joined stages as the orchestrator sees them: when it takes their links for hung."""

from types import SimpleNamespace

import numpy as np
import pytest
import trio

import pipeline.orchestrator.step_link
from pipeline.agreement.addresses import StageEndpoint
from pipeline.engine.limits import Limits
from pipeline.engine.step import Step
from pipeline.errors import MessageError, StageLost
from pipeline.orchestrator.remote_pipeline import Pipeline, PipelineOptions
from pipeline.orchestrator.step_link import StepLink
from pipeline.protocol.batch import Segment
from pipeline.protocol.messages import Abort, Done, Start
from pipeline.protocol.result_kinds import NO_TOKEN, Result, Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import token_ids_to_wire
from pipeline.protocol.step_results import result_to_wire
from pipeline.protocol.time_limits import TimeLimits

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
    options = PipelineOptions(Limits(1, 64), TimeLimits(connect_seconds=10, idle_seconds=10))
    manifest = SimpleNamespace(stages=(None,))
    joined = Pipeline(manifest, options, None, None, None, nursery)
    joined._link = StepLink(None, None, None, num_stages=1, vocab_size=2)
    yield joined
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("token_ids", "top_ids"), [([2], [0]), ([NO_TOKEN - 1], [0]), ([1], [2])], ids=str
)
async def test_tokens_of_another_vocabulary_are_refused(joined, monkeypatch, token_ids, top_ids):
    want = Want(Result.DRAWN, 1, 1, 1)
    header = STEP.header._replace(wants=(want,))
    arrays = {"logits": [], "hidden": [], "logprobs": np.zeros(2, np.float32)}

    async def receive(channel, gate):
        await trio.lowlevel.checkpoint()
        return header, result_to_wire(token_ids, top_ids=np.array(top_ids, np.uint32), **arrays)

    monkeypatch.setattr(pipeline.orchestrator.step_link, "receive_step", receive)
    await joined.send(STEP)
    with pytest.raises(MessageError, match="outside the vocabulary of 2"):
        await joined.receive()


async def test_a_row_without_a_token_is_no_fault_of_the_stage(joined, monkeypatch):
    async def receive(channel, gate):
        await trio.lowlevel.checkpoint()
        return STEP.header, (token_ids_to_wire([NO_TOKEN]),)

    monkeypatch.setattr(pipeline.orchestrator.step_link, "receive_step", receive)
    await joined.send(STEP)
    assert (await joined.receive()).token_ids == [NO_TOKEN]


@pytest.mark.parametrize("exact", [(), (True,), (True, True), (True, False), (False, False)])
async def test_rows_are_exact_where_all_stages_say_so(joined, exact):
    joined._epochs.ready = tuple(SimpleNamespace(is_row_exact=each) for each in exact)
    assert joined.is_row_exact is (exact in {(True,), (True, True)})


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


class Told:
    """A stage's control channel, of which only what is told counts."""

    figures = None

    def __init__(self, idx, is_lost=False):
        self.idx = idx
        self.is_lost = is_lost
        self.told = []
        self._untold = []

    def note(self, notices):
        self._untold += notices

    async def tell(self):
        await trio.lowlevel.checkpoint()
        if self.is_lost:
            raise StageLost(self.idx, "gone")
        self.told += self._untold
        self._untold.clear()


async def test_a_stage_that_is_lost_keeps_nobody_from_being_told(joined):
    start, done = Start(request_id=1, slot=0), Done(request_id=1)
    first, last = Told(0, is_lost=True), Told(1)
    joined._stages = {0: first, 1: last}
    with pytest.raises(StageLost):
        await joined.notify([start])
    joined._stages = {1: last}
    await joined.notify([done])
    assert last.told == [start, done]


AT = StageEndpoint.model_validate(
    {name: {"type": "tcp", "addr": "h:1"} for name in ("control", "data_in")}
)


async def test_a_stage_that_comes_later_is_told_of_requests_under_way(joined, monkeypatch):
    await joined.notify([Start(request_id=i, slot=i) for i in range(3)])
    await joined.notify([Done(request_id=0), Abort(request_id=2)])
    met = Told(0)
    monkeypatch.setattr(pipeline.orchestrator.remote_pipeline, "RemoteStage", lambda *args: met)

    async def control(_):
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(joined, "_watch", control)
    joined._connector = SimpleNamespace(control=control, pending={}, absent=set())
    joined._placement = SimpleNamespace(start=control, where=lambda _: AT)
    joined._manifest.stage = lambda idx: None
    await joined._meet(0)
    await met.tell()
    assert met.told == [Start(request_id=1, slot=1)]
