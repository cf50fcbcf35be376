"""Losses around the moments at which a window drops rows leave no mark on a text."""

import numpy as np
import pytest

from pipeline.codecs.registry import make_codec
from pipeline.engine.limits import Limits
from pipeline.engine.request import Request
from pipeline.engine.scheduler import Scheduler
from pipeline.orchestrator.replay_plan import ORCHESTRATOR_IDX, plan_replay
from pipeline.protocol.step_limits import step_tensors
from pipeline.protocol.step_results import step_result
from pipeline.protocol.tide_window import TideWindow
from pipeline.stage.step_executor import StageCore

WINDOW = TideWindow(40, 4)
LIMITS = Limits(2, 4096, chunk_tokens=16, num_stages=2, window=WINDOW)
NUM_TOKENS = 60
PROMPTS = (tuple(range(3, 33)), tuple(range(5, 55)))


class Stages:
    """Two stages, in this process, that are lost and rebuilt as remote ones are."""

    def __init__(self, oracle):
        self.shards = oracle.split(2)
        codec = make_codec("F32", oracle.config.hidden_dim)
        self.limits = LIMITS.for_session(codec)
        self.cores = [self.new(idx) for idx in range(2)]

    def new(self, idx):
        return StageCore(self.shards[idx], self.limits)

    def run(self, step, until=1):
        header, tensors = step.header, step_tensors(step.header, step.token_ids, step.asked)
        for core in self.cores[: until + 1]:
            tensors = core.step(header, tensors)
        return tensors

    def lose(self, lost, scheduler):
        lengths = scheduler.rewind()
        new = {0, 1} if scheduler.must_rebuild else lost
        plan = plan_replay(new, set())
        for idx in range(2):
            if idx in lost:
                self.cores[idx] = self.new(idx)
            else:
                self.cores[idx].rewind([0, 0] if idx in plan.rebuilt else lengths)
        if (until := plan.sources.get(ORCHESTRATOR_IDX)) is not None:
            for step in scheduler.replay(until):
                self.run(step, until)
        assert [list(core.cache.lengths) for core in self.cores] == [lengths] * 2
        return scheduler.must_rebuild


def texts(oracle, lost=frozenset(), at=-1, seen=()):
    """What both requests say; `lost` stages are lost once, at a step that `seen` of them saw."""
    stages, scheduler = Stages(oracle), Scheduler(LIMITS)
    for request_id, prompt in enumerate(PROMPTS):
        scheduler.submit(Request(request_id, prompt, NUM_TOKENS))
    found, has_rebuilt, count = {0: [], 1: []}, False, 0
    while scheduler.has_work:
        step = scheduler.next_step()
        assert step is not None
        if count == at:
            if seen:
                stages.run(step, max(seen))
            has_rebuilt = stages.lose(lost, scheduler)
            count += 1
            continue
        result = step_result(step.header, stages.run(step))
        for event in scheduler.complete(step.header, result.token_ids):
            found[event.request_id].append(event.token_id)
        count += 1
    return found, has_rebuilt


@pytest.mark.parametrize(
    ("lost", "seen"), [({1}, (0,)), ({0}, (0, 1)), (frozenset(), (0, 1)), ({0, 1}, ())], ids=str
)
def test_a_loss_before_at_and_after_a_drop_leaves_the_text_as_it_is(
    make_oracle, native, lost, seen
):
    oracle = make_oracle("llama-untied-gqa").computing_with(native)
    expected, _ = texts(oracle)
    assert all(len(text) == NUM_TOKENS for text in expected.values())
    assert np.unique(expected[0]).size > 10
    # the first request's 40 positions are full after about as many steps, and then every other one
    rebuilt = [False] * 2
    for at in range(2, 26):
        found, must_rebuild = texts(oracle, lost, at, seen)
        assert found == expected, at
        rebuilt[must_rebuild] = True
    assert rebuilt[False]


def test_a_prompt_in_one_step_that_crosses_a_drop_is_rebuilt_if_it_is_lost():
    scheduler = Scheduler(LIMITS)
    scheduler.submit(Request(0, tuple(range(100)), 5))
    steps = []
    for _ in range(3):
        steps.append(scheduler.next_step())
        if sum(len(step.token_ids) for step in steps) > 32:
            break
        scheduler.complete(steps[-1].header, ())
    assert sum(len(step.token_ids) for step in steps) > WINDOW.size
    assert scheduler.rewind() == [32, 0]
    assert scheduler.must_rebuild
    assert scheduler.rewind() == [32, 0]
    assert not scheduler.must_rebuild
