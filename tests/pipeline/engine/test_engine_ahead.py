"""The engine over a pipeline that sends steps ahead, loses them, and has no numbers at times."""

import random
from collections import deque

import pytest
import trio

from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.engine.step_runner import RunnerStats
from pipeline.errors import LinkLost, RequestFailed, SessionError
from pipeline.protocol.result_kinds import NO_TOKEN
from pipeline.protocol.step_header import StepKind
from pipeline.protocol.step_results import StepResult
from pipeline.sampling.params import SamplingParams

VOCAB = 5  # so that ends come often, token 0 among them
CONTEXT = 40


def model(token_ids):
    return (sum(token_ids) * 31 + len(token_ids)) % VOCAB


class Ahead:
    """Sends the step that is prepared the moment its token comes, and takes no other after it."""

    stats = RunnerStats()

    def __init__(self, slots, rng, faults):
        self._slots = slots
        self._rng = rng
        self._faults = faults
        self._steps = deque()
        self._prepared = None
        self._sent = None

    async def notify(self, notices):
        await trio.lowlevel.checkpoint()

    async def send(self, step):
        sent, self._sent = self._sent, None
        assert sent in {None, (step.header, step.token_ids)}, "another step was sent ahead"
        self._steps.append(step)

    def prepare(self, follow_up):
        self._prepared = follow_up

    async def receive(self):
        await trio.sleep(self._rng.random() * 0.0005)
        if self._rng.random() < self._faults:
            raise LinkLost(0, "it broke")
        step = self._steps.popleft()
        tokens, start = [], 0
        for segment, want in zip(step.header.segments, step.header.wants, strict=True):
            held = self._slots.setdefault(segment.slot, [])
            if step.header.kind is StepKind.TRUNCATE:
                del held[segment.position :]
                continue
            assert len(held) == segment.position
            held += step.token_ids[start : start + segment.num_tokens]
            start += segment.num_tokens
            if want:
                tokens.append(NO_TOKEN if self._rng.random() < self._faults else model(held))
        due = self._prepared
        is_due = due is not None and due.due == step.header and tokens[0] != NO_TOKEN
        if is_due and tokens[0] not in due.ends:
            self._sent = (due.header, (tokens[0],))
        return StepResult(step.header, tokens)


async def serve(engine, slots, rng, faults):
    while True:
        try:
            await engine.run(Ahead(slots, rng, faults))
        except SessionError:
            for slot, length in enumerate(engine.scheduler.rewind()):
                del slots.setdefault(slot, [])[length:]


def whole_text(prompt, num_tokens, ends):
    known = list(prompt)
    while len(known) - len(prompt) < num_tokens and len(known) <= CONTEXT:
        known.append(model(known))
        if known[-1] in ends:
            break
    return known[len(prompt) :]


async def ask(engine, rng):
    """One request, which leaves at some token; its text is right as far as it goes."""
    await trio.sleep(rng.random() * 0.02)
    prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 20)))
    num_tokens, ends = rng.randint(1, 15), frozenset(rng.sample(range(VOCAB), 1))
    expected, leaves_at = whole_text(prompt, num_tokens, ends), rng.randint(1, 30)
    found, is_whole = [], False
    try:
        async with engine.generate(Generation(prompt, num_tokens, ends, SamplingParams())) as text:
            async for output in text:
                found.append(output.token_id)
                if len(found) == leaves_at:
                    break
            else:
                is_whole = True
    except RequestFailed:
        pass
    assert found == (expected if is_whole else expected[: len(found)])


@pytest.mark.parametrize("faults", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(20))
async def test_whoever_leaves_or_fails_the_step_sent_ahead_is_the_next_one(seed, faults):
    rng, slots = random.Random(seed), {}
    limits = Limits(rng.randint(1, 3), CONTEXT, rng.randint(1, 8), rng.randint(1, 3))
    engine = PipelineEngine(limits)
    with trio.fail_after(30):
        async with trio.open_nursery() as serving:
            serving.start_soon(serve, engine, slots, rng, faults)
            async with trio.open_nursery() as asking:
                for _ in range(6):
                    asking.start_soon(ask, engine, rng)
            while engine.scheduler.has_work:  # noqa: ASYNC110 - slots are cleared behind the last
                await trio.sleep(0.002)
            serving.cancel_scope.cancel()
    assert not any(slots.values())
