"""Which of several engines a request goes to."""

import random
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import trio

from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.engine.replicas import MAX_SESSIONS, Replicas
from pipeline.errors import PromptError
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.sampling.params import SamplingParams
from tests.pipeline.engine.engines import LIMITS, Yielding, new_cores, tokens_of

PROMPT = tuple(range(100, 160))


def generation(prompt_ids=(1, 2, 3), salt=b"me", session=None, max_tokens=4):
    stored = None if session is None else SimpleNamespace(session_id=session)
    return Generation(
        prompt_ids, max_tokens, frozenset(), SamplingParams(), salt=salt, stored=stored
    )


class Stages:
    """Engines whose stages are told to hold exact rows, and which none runs."""

    def __init__(self, count, num_slots=8):
        limits = Limits(num_slots, 128)
        self.members = [
            SimpleNamespace(
                engine=PipelineEngine(limits, prefixes=PrefixOptions(1.0)), takes_requests=True
            )
            for _ in range(count)
        ]
        for member in self.members:
            member.engine.allow_reuse(True)
        self.replicas = Replicas(self.members)

    @asynccontextmanager
    async def open(self, *generations):
        """These requests, none of which ends."""
        async with trio.open_nursery() as nursery:
            for each in generations:
                await nursery.start(self._hold, each)
            yield
            nursery.cancel_scope.cancel()

    async def _hold(self, generation, task_status):
        async with self.replicas.generate(generation):
            task_status.started()
            await trio.sleep_forever()

    @property
    def loads(self):
        return [member.engine.scheduler.num_waiting for member in self.members]


def several(count):
    return [generation((idx, 1, 2), salt=bytes([idx])) for idx in range(count)]


async def test_whoever_has_least_to_do_gets_what_nobody_holds():
    stages = Stages(3)
    async with stages.open(*several(9)):
        assert stages.loads == [3, 3, 3]
    assert stages.loads == [0, 0, 0]


async def test_a_prompt_goes_where_its_beginning_is():
    stages = Stages(2)
    async with stages.open(generation((9, 9), salt=b"x"), generation(PROMPT)):
        assert stages.loads == [1, 1]
        assert stages.replicas.choose(generation((*PROMPT, 7))) == 1
        # Attack: nobody learns from where he is served what others have asked.
        assert stages.replicas.choose(generation((*PROMPT, 7), salt=b"another's")) == 0
        assert stages.replicas.choose(generation((*PROMPT, 7), salt=None)) == 0
        # What is shared by so few tokens is computed sooner than it is copied.
        assert stages.replicas.choose(generation((*PROMPT[:10], 7))) == 0


async def test_what_all_prompts_begin_with_does_not_keep_them_in_one_place():
    stages = Stages(2)
    async with stages.open(*[generation((*PROMPT, idx)) for idx in range(16)]):
        assert max(stages.loads) <= 9


async def test_nobody_waits_for_a_slot_while_there_is_one_elsewhere():
    stages = Stages(2, num_slots=2)
    async with stages.open(*[generation((*PROMPT, idx)) for idx in range(4)]):
        assert stages.loads == [2, 2]


async def test_a_session_goes_on_where_it_was():
    stages = Stages(2)
    first = stages.replicas.choose(generation(session=b"a"))
    async with stages.open(generation(salt=b"x")):
        assert first == 0
        assert stages.replicas.choose(generation(session=b"b")) == 1
        assert stages.replicas.choose(generation(session=b"a")) == 0
    stages.members[0].takes_requests = False
    assert stages.replicas.choose(generation(session=b"a")) == 1
    stages.members[0].takes_requests = True
    assert stages.replicas.choose(generation(session=b"a")) == 1


def test_sessions_of_long_ago_are_forgotten():
    stages = Stages(2)
    for idx in range(MAX_SESSIONS + 5):
        stages.replicas.choose(generation(session=idx.to_bytes(4)))
    assert len(stages.replicas._sessions) == MAX_SESSIONS


async def test_who_takes_none_gets_none_unless_nobody_does():
    stages = Stages(2)
    stages.members[0].takes_requests = False
    async with stages.open(*several(4)):
        assert stages.loads == [0, 4]
        stages.members[1].takes_requests = False
        assert stages.replicas.choose(generation()) == 0


async def test_one_is_idle_when_its_last_request_has_left(autojump_clock):
    stages = Stages(2)
    async with trio.open_nursery() as nursery:
        async with stages.open(*several(2)):
            nursery.start_soon(stages.replicas.wait_idle, 0)
            with trio.move_on_after(100) as waits:
                await stages.replicas.wait_idle(1)
            assert waits.cancelled_caught
        await stages.replicas.wait_idle(1)
    with pytest.raises(PromptError):
        async with stages.replicas.generate(generation((1,) * 200)):
            pass
    await stages.replicas.wait_idle(0)  # who was refused is not waited for
    assert stages.replicas.max_seq_len == 128


async def test_a_text_is_the_same_whoever_computes_it(shards):
    rng = random.Random(3)
    members = [
        SimpleNamespace(engine=PipelineEngine(LIMITS), takes_requests=True) for _ in range(2)
    ]
    replicas = Replicas(members)
    prompts = [tuple(rng.randrange(255) for _ in range(rng.randint(1, 40))) for _ in range(6)]
    requests = [
        replace(generation(ids, max_tokens=8), sampling=SamplingParams(temperature=1.0, seed=idx))
        for idx, ids in enumerate(prompts)
    ]
    found = {}

    async def ask(idx, request):
        found[idx] = await tokens_of(replicas, request)

    async with trio.open_nursery() as running:
        for member in members:
            local = LocalPipeline(new_cores(shards))
            running.start_soon(member.engine.run, Yielding(local))
        async with trio.open_nursery() as asking:
            for idx, request in enumerate(requests):
                asking.start_soon(ask, idx, request)
        assert all(member.engine.stats.num_tokens for member in members)
        for idx, request in enumerate(requests):
            assert await tokens_of(members[idx % 2].engine, request) == found[idx]
        running.cancel_scope.cancel()
