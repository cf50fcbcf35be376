"""Stages whose keys and values outlive them: successors go on from these, and texts do not change.

Workers of this process are killed as one can be here: they leave everything as it is.
"""

import os
from dataclasses import replace

import pytest
import trio

from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.kernels.session_memory import SessionMemory
from pipeline.orchestrator.epochs import Epochs
from pipeline.orchestrator.failover import run_with_failover
from pipeline.sampling.params import SamplingParams
from pipeline.stage.step_executor import StageCore
from pipeline.stage.worker import StageWorker
from tests.pipeline.orchestrator.test_moving import Nomads

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create") or why_not_native() is not None,
    reason="needs memory without a name, and native kernels",
)
NUM_TOKENS = 30
SAMPLED = {0: SamplingParams(), 1: SamplingParams(temperature=0.9, seed=3)}


class Killed(Nomads):
    """Workers that find what their predecessors have left, unless that is lost as well."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.memories = {idx: os.memfd_create("session") for idx in range(3)}

    def worker(self, setup):
        memory = SessionMemory(self.memories[setup.stage_idx])
        return StageWorker(replace(setup, session_memory=memory))

    def lose(self, idx):
        os.close(self.memories[idx])
        self.memories[idx] = os.memfd_create("session")

    async def texts(self, kills, lost=()):
        """Tokens of two requests; `kills` names the stages to kill when so many have come."""
        limits = Limits(2, 256, num_stages=3)
        engine = PipelineEngine(limits)
        texts = {0: [], 1: []}

        def hear(output, index):
            texts[index].append(output.token_id)
            for idx in kills.get(sum(map(len, texts.values())), ()):
                self.move(idx)
                if idx in lost:
                    self.lose(idx)

        for index, params in SAMPLED.items():
            prompt = tuple(range(100 + index, 120))
            engine.submit(
                Generation(prompt, NUM_TOKENS, frozenset(), params),
                lambda output, index=index: hear(output, index),
            )
        async with self.pipeline(limits) as pipeline:
            await run_with_failover(pipeline, engine.drain, engine.scheduler, 600)
        return texts


@pytest.fixture
async def killed(tiny_model, tmp_path, nursery, monkeypatch, caplog):
    caplog.set_level("INFO")
    found = Killed(tiny_model, tmp_path, nursery)
    yield found
    nursery.cancel_scope.cancel()
    for fd in found.memories.values():
        os.close(fd)


@pytest.fixture
def nothing_ends(monkeypatch):
    """No session of a worker that is ended from now on is released."""

    def begin():
        monkeypatch.setattr(StageCore, "release", lambda core: None)

    return begin


def told(caplog, event):
    return caplog.text.count(f"event={event}")


KILLS = {8: [1], 17: [0], 25: [2], 33: [0, 2], 41: [0, 1, 2]}


async def test_texts_are_the_undisturbed_ones_and_nothing_is_replayed(killed, nothing_ends, caplog):
    with trio.fail_after(600):
        expected = await killed.texts({})
        nothing_ends()
        assert await killed.texts(KILLS) == expected
    assert told(caplog, "went_on") == sum(map(len, KILLS.values()))
    assert told(caplog, "replayed") == 0


async def test_what_is_gone_is_replayed(killed, nothing_ends, caplog):
    with trio.fail_after(600):
        expected = await killed.texts({})
        nothing_ends()
        assert await killed.texts({8: [1], 25: [0, 1]}, lost=[1]) == expected
    assert told(caplog, "went_on") == 1
    assert caplog.text.count("stage 1 begins anew: what it held is gone") > 0
    assert told(caplog, "replayed") > 0


async def test_who_has_gone_on_and_is_lost_before_any_result_is_rebuilt(
    killed, nothing_ends, monkeypatch, caplog
):
    """What it found may be why."""
    with trio.fail_after(600):
        expected = await killed.texts({})
        nothing_ends()
        note_proof = Epochs.note_proof

        def note_none_of_those(epochs):
            if not epochs._gone_on:
                note_proof(epochs)

        monkeypatch.setattr(Epochs, "note_proof", note_none_of_those)
        assert await killed.texts({8: [1], 25: [1]}) == expected
    assert told(caplog, "went_on") == 1
    assert told(caplog, "replayed") > 0


async def test_a_worker_that_ends_in_order_leaves_nothing_to_go_on_from(killed, caplog):
    with trio.fail_after(600):
        expected = await killed.texts({})
        assert await killed.texts({8: [1], 25: [0]}) == expected
        assert told(caplog, "went_on") == 0
        while any(os.fstat(fd).st_blocks for fd in killed.memories.values()):  # noqa: ASYNC110
            await trio.sleep(0.01)  # they still hear the others out
