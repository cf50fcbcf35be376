"""A lone request's steps are sent ahead, whoever comes, leaves or is lost meanwhile."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import trio

from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.engine.request import FinishReason
from pipeline.engine.step import Step
from pipeline.engine.step_runner import RunnerStats
from pipeline.errors import InputError, PipelineError, SessionError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.orchestrator.step_ahead import Ahead
from pipeline.protocol.last_stage_inputs import asked_from_wire
from pipeline.protocol.messages import Abort, Done, Start
from pipeline.protocol.step_header import StageTiming, decode_step, encode_step
from pipeline.protocol.step_limits import token_ids_to_wire
from pipeline.protocol.step_results import result_to_wire
from pipeline.sampling.params import SamplingParams
from pipeline.stage.step_executor import StageCore
from transport.tensor_frames import DType, Frame, FrameKind, Tensor, TensorSpec, encode_frame

LIMITS = Limits(num_slots=3, max_seq_len=128, chunk_tokens=16)
TIMING = (StageTiming(1, 2, 3),)
VOCAB = 256


class Sending:
    """A local pipeline that is sent steps ahead as a remote one is, and held to it as strictly.

    Other tasks have their turn wherever they may have one: also between the token, with which the
    next step leaves, and whoever is told of it.
    """

    stats = RunnerStats()

    def __init__(self, core, rng=None):
        self._core = core
        self._local = LocalPipeline([core])
        self._ahead = Ahead(1)
        self._rng = rng
        # What a test does at either moment.
        self.before_token = self.after_token = lambda: None
        self.fails_at = -1
        self.num_ahead = 0
        self.num_results = 0
        self.told = []

    def replay(self, scheduler):
        """Take over from a pipeline that is lost."""
        scheduler.rewind()
        for step in scheduler.replay(0):
            self._core.step(step.header, (token_ids_to_wire(step.token_ids),))

    async def _turn(self):
        for _ in range(1 if self._rng is None else self._rng.randint(1, 4)):
            await trio.lowlevel.checkpoint()

    async def notify(self, notices):
        await self._turn()
        self.told += notices

    async def send(self, step):
        await self._turn()
        if not self._ahead.has_sent(step.header):
            await self._local.send(step)

    def prepare(self, follow_up):
        self._follow_up = follow_up
        self._ahead.prepare(follow_up)

    async def receive(self):
        await self._turn()
        self.before_token()
        result = await self._local.receive()
        if self._ahead.is_prepared:
            form = self._ahead.follow(on_the_wire(result), VOCAB)
            if form is not None:
                self.num_ahead += 1
                await self._local.send(read(form))
        await self._turn()
        self.after_token()
        if self.num_results == self.fails_at:
            raise SessionError("stage 0 is lost")
        self.num_results += 1
        return result


def on_the_wire(result):
    """The frame that the last stage sends home."""
    nothing = {"logits": np.empty((0, 0)), "hidden": np.empty((0, 0))}
    scores = result.logprobs, result.top_ids
    logprobs, top_ids = (np.empty(0) if each is None else each for each in scores)
    tensors = result_to_wire(result.token_ids, **nothing, logprobs=logprobs, top_ids=top_ids)
    header = encode_step(result.header._replace(timings=TIMING))
    return memoryview(encode_frame(Frame(FrameKind.DATA, header, tensors))[0])


def read(form):
    """The step that stages find in a frame."""
    header = decode_step(form.plain[form.header_start : form.header_stop].tobytes())
    token_ids, *draws = [form.plain[start:stop] for start, stop in form.places]
    tensors = [Tensor(TensorSpec(DType.U8, (len(data),)), data) for data in draws]
    asked = asked_from_wire(header.wants, tensors, VOCAB)
    return Step(header, tuple(token_ids.cast("I")), (), asked=asked)


@pytest.fixture(scope="module")
def shard(tiny_model):
    return load_shard(tiny_model, load_config(tiny_model), 0, 4, expected_hashes=None)


@pytest.fixture
def new_pipeline(shard):
    limits = LIMITS.for_session(make_codec("F32", 64))
    return lambda rng=None: Sending(StageCore(shard, limits), rng)


def greedy(*prompt_ids, num_tokens=12, eos=frozenset()):
    return Generation(prompt_ids, num_tokens, eos, SamplingParams())


def listen(engine, generation):
    """Submit; a list that its tokens are put into, and what to cancel it by."""
    heard = []
    return heard, engine.submit(generation, heard.append)


def ids(heard):
    return [output.token_id for output in heard]


@pytest.fixture
async def expected(new_pipeline):
    engine = PipelineEngine(LIMITS)
    heard, _ = listen(engine, greedy(3, 1, 4))
    await engine.drain(new_pipeline())
    return ids(heard)


async def test_a_lone_requests_steps_leave_with_its_tokens(new_pipeline, expected):
    engine, pipeline = PipelineEngine(LIMITS), new_pipeline()
    heard, _ = listen(engine, greedy(3, 1, 4))
    await engine.drain(pipeline)
    assert ids(heard) == expected
    assert pipeline.num_ahead == 11  # all but the prompt's


@pytest.mark.parametrize("moment", ["before_token", "after_token"])
@pytest.mark.parametrize("what", ["comes", "leaves", "is replaced"])
async def test_others_come_and_it_leaves_around_the_token(new_pipeline, expected, moment, what):
    engine, pipeline = PipelineEngine(LIMITS), new_pipeline()
    heard, lone = listen(engine, greedy(3, 1, 4))
    others = []

    def disturb():
        if pipeline.num_results == 4 and not others:
            others.append([])
            if what != "comes":
                assert engine.cancel(lone)
            if what != "leaves":
                others[0] = listen(engine, greedy(3, 1, 4))[0]

    setattr(pipeline, moment, disturb)
    await engine.drain(pipeline)
    assert ids(heard) == (expected if what == "comes" else expected[:4])
    assert ids(others[0]) == ([] if what == "leaves" else expected)
    assert not engine.scheduler.has_work
    assert [type(notice) for notice in pipeline.told].count(Abort) == (what != "comes")


async def drained(engine, new_pipeline, fails_at):
    """Over a pipeline that is lost at that step, and the one after it; the last of them."""
    pipeline = new_pipeline()
    pipeline.fails_at = fails_at
    if fails_at >= 0:
        with pytest.raises(SessionError):
            await engine.drain(pipeline)
        pipeline = new_pipeline()
        pipeline.replay(engine.scheduler)
    await engine.drain(pipeline)
    return pipeline


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.2, "seed": 2, "top_p": 0.9, "logprobs": 3},
        {"temperature": 1.0, "seed": 3, "frequency_penalty": 1.5, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": 4, "allowed_token_ids": (1, 2, 3, 50), "min_tokens": 6},
        {"repetition_penalty": 1.5, "logit_bias": {7: 2.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("fails_at", [-1, 5])
async def test_what_is_drawn_is_the_same_with_steps_sent_ahead(new_pipeline, sampling, fails_at):
    asked = Generation((3, 1, 4), 12, frozenset({1}), SamplingParams(**sampling), vocab_size=VOCAB)
    here, _ = listen(engine := PipelineEngine(LIMITS), replace(asked, samples_at_home=True))
    await engine.drain(new_pipeline())
    heard, _ = listen(engine := PipelineEngine(LIMITS), asked)
    pipeline = await drained(engine, new_pipeline, fails_at)
    assert ids(heard) == ids(here)
    assert pipeline.num_ahead >= len(heard) - 1 - max(fails_at, 0)
    for there, at_home in zip(heard, here, strict=True):
        assert [token_id for token_id, _ in there.top] == [token_id for token_id, _ in at_home.top]


class Alternates:
    """A mask that depends on the text: behind an even token odd ones, and the other way round."""

    def __init__(self, fails_after=1 << 30):
        self._fails_after = fails_after

    def allowed(self, generated, vocab_size):
        if len(generated) >= self._fails_after:
            raise InputError("no more than that")
        return np.arange(vocab_size) % 2 != (generated[-1] if generated else 0) % 2


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0, "seed": 1, "logprobs": 2}, {"frequency_penalty": 1.5}],
    ids=str,
)
@pytest.mark.parametrize("fails_at", [-1, 5])
async def test_a_mask_of_the_text_leaves_with_the_token_it_depends_on(
    new_pipeline, sampling, fails_at
):
    asked = Generation(
        (3, 1, 4), 12, frozenset(), SamplingParams(**sampling), masks=(Alternates(),),
        vocab_size=VOCAB,
    )  # fmt: skip
    here, _ = listen(engine := PipelineEngine(LIMITS), replace(asked, samples_at_home=True))
    await engine.drain(new_pipeline())
    heard, _ = listen(engine := PipelineEngine(LIMITS), asked)
    pipeline = await drained(engine, new_pipeline, fails_at)
    assert ids(heard) == ids(here)
    assert {(a + b) % 2 for a, b in itertools.pairwise(ids(heard))} == {1}
    assert pipeline.num_ahead >= len(heard) - 1 - max(fails_at, 0)


async def test_a_mask_that_fails_ahead_ends_its_request_and_no_other(new_pipeline, expected):
    engine, pipeline = PipelineEngine(LIMITS), new_pipeline()
    masked = Generation(
        (3, 1, 4), 12, frozenset(), SamplingParams(temperature=1.0, seed=1),
        masks=(Alternates(fails_after=4),), vocab_size=VOCAB,
    )  # fmt: skip
    heard, _ = listen(engine, masked)
    await engine.drain(pipeline)
    assert pipeline.num_ahead == 4
    assert len(ids(heard[:-1])) == 4
    assert str(heard[-1]) == "no more than that"
    others, _ = listen(engine, greedy(3, 1, 4))
    await engine.drain(pipeline)
    assert ids(others) == expected


async def test_nothing_follows_an_end(new_pipeline, expected):
    engine, pipeline = PipelineEngine(LIMITS), new_pipeline()
    end = expected[5]
    first = expected.index(end)
    heard, _ = listen(engine, greedy(3, 1, 4, eos=frozenset({end})))
    await engine.drain(pipeline)
    assert ids(heard) == expected[: first + 1]
    assert heard[-1].finish is FinishReason.EOS
    assert pipeline.num_ahead == first


async def test_a_text_that_its_listener_ends_leaves_room_for_the_next(new_pipeline, expected):
    engine, pipeline = PipelineEngine(replace(LIMITS, num_slots=1)), new_pipeline()
    heard = []

    def hear(output):
        heard.append(output)
        if len(heard) == 3:
            engine.cancel(first)

    first = engine.submit(greedy(3, 1, 4), hear)
    second, _ = listen(engine, greedy(3, 1, 4))
    await engine.drain(pipeline)
    assert ids(heard) == expected[:3]
    assert ids(second) == expected
    assert [(type(each), each.request_id) for each in pipeline.told] == [
        (Start, 0), (Abort, 0), (Start, 1), (Done, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("fails_at", [0, 1, 5, 11])
async def test_a_loss_right_after_a_step_was_sent_ahead(new_pipeline, expected, fails_at):
    engine, pipeline = PipelineEngine(LIMITS), new_pipeline()
    pipeline.fails_at = fails_at
    heard, _ = listen(engine, greedy(3, 1, 4))
    with pytest.raises(SessionError):
        await engine.drain(pipeline)
    assert ids(heard) == expected[:fails_at]  # what had come is heard in spite of it
    again = new_pipeline()
    again.replay(engine.scheduler)
    await engine.drain(again)
    assert ids(heard) == expected


async def serve(engine, new_pipeline, rng):
    """Run requests on pipelines that are lost now and then."""
    pipeline = new_pipeline(rng)
    while True:
        pipeline.fails_at = rng.randint(5, 40)
        with pytest.raises(SessionError):
            await engine.run(pipeline)
        pipeline = new_pipeline(rng)
        pipeline.replay(engine.scheduler)


async def ask(engine, generation, rng):
    """The tokens of a request that comes at some time, and may not stay to its end."""
    for _ in range(rng.randint(0, 60)):
        await trio.lowlevel.checkpoint()
    num_wanted, heard = rng.choice([1, 3, 100]), []
    async with engine.generate(generation) as stream:
        async for output in stream:
            heard.append(output.token_id)
            if len(heard) == num_wanted:
                break
    return heard, num_wanted


@pytest.mark.parametrize("seed", range(12))
async def test_any_crowd_gets_what_each_would_get_alone(new_pipeline, seed):
    rng = random.Random(seed)
    generations = [
        Generation(
            tuple(rng.randrange(255) for _ in range(rng.randint(1, 30))),
            rng.randint(1, 12),
            frozenset(rng.sample(range(VOCAB), 20)),
            SamplingParams(temperature=rng.choice([0, 1]), seed=5),
        )
        for _ in range(10)
    ]
    alone = []
    for generation in generations:
        engine = PipelineEngine(LIMITS)
        heard, _ = listen(engine, generation)
        await engine.drain(new_pipeline())
        alone.append(ids(heard))
    engine = PipelineEngine(LIMITS)

    async def check(index):
        heard, num_wanted = await ask(engine, generations[index], rng)
        assert heard == alone[index][:num_wanted]

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, engine, new_pipeline, rng)
            async with trio.open_nursery() as clients:
                for index in range(len(generations)):
                    clients.start_soon(check, index)
            nursery.cancel_scope.cancel()


async def test_a_failing_sampler_is_heard_of(new_pipeline):
    def fail(token_ids, logits):
        raise ZeroDivisionError

    engine, pipeline = PipelineEngine(LIMITS), new_pipeline()
    heard, _ = listen(engine, replace(greedy(3, 1, 4), processors=(fail,)))
    await engine.drain(pipeline)
    assert len(heard) == 1
    assert isinstance(heard[0], PipelineError)
    assert [type(notice) for notice in pipeline.told] == [Start, Abort]
