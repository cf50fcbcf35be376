"""Many requests over one pipeline: each gets what it would get alone."""

import random
from dataclasses import replace

import numpy as np
import pytest
import trio

from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.request import FinishReason
from pipeline.engine.scheduler import Limits
from pipeline.errors import InputError, PromptError, RequestFailed, SessionError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.protocol.step_limits import token_ids_to_wire
from pipeline.protocol.wants import Result, Want
from pipeline.sampling.params import MAX_BIASES, ChooserSpec, SamplingParams
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.core import StageCore

LIMITS = Limits(num_slots=4, max_seq_len=128, chunk_tokens=16)


class Yielding:
    """A local pipeline that lets other tasks run at every step, as a remote one does."""

    def __init__(self, local):
        self._local = local
        self.stats = local.stats

    async def notify(self, notices):
        await trio.lowlevel.checkpoint()

    async def send(self, step):
        await trio.lowlevel.checkpoint()
        await self._local.send(step)

    def prepare(self, follow_up):
        pass

    async def receive(self):
        await trio.lowlevel.checkpoint()
        return await self._local.receive()


class Breaking(Yielding):
    """Fails after so many steps."""

    def __init__(self, local, num_steps):
        super().__init__(local)
        self._left = num_steps

    async def receive(self):
        self._left -= 1
        if self._left < 0:
            raise SessionError("stage 1 is lost")
        return await super().receive()


@pytest.fixture(scope="module")
def shards(tiny_model):
    config = load_config(tiny_model)
    return [
        load_shard(tiny_model, config, start, end, expected_hashes=None)
        for start, end in ((0, 2), (2, 4))
    ]


def new_cores(shards):
    limits = LIMITS.for_session(make_codec("F32", 64))
    log = ActivationLog(LIMITS.num_slots, LIMITS.max_seq_len, 64)
    return [StageCore(shards[0], limits, log), StageCore(shards[1], limits)]


@pytest.fixture
def cores(shards):
    return new_cores(shards)


@pytest.fixture
async def engine(cores, nursery):
    engine = PipelineEngine(LIMITS)
    nursery.start_soon(engine.run, Yielding(LocalPipeline(cores)))
    return engine


def generation(rng, max_tokens=12, **sampling):
    prompt_ids = tuple(rng.randrange(255) for _ in range(rng.randint(1, 60)))
    return Generation(prompt_ids, max_tokens, frozenset(), SamplingParams(**sampling))


async def tokens_of(engine, request):
    async with engine.generate(request) as stream:
        return [output.token_id async for output in stream]


async def settle(engine):
    for _ in range(200):
        if engine.stats.num_running == 0 and engine.stats.num_waiting == 0:
            return
        await trio.lowlevel.checkpoint()


async def test_requests_get_the_same_tokens_alone_and_in_company(engine):
    rng = random.Random(11)
    requests = [
        generation(rng, rng.randint(1, 20), temperature=rng.choice([0.0, 0.9]), seed=i)
        for i in range(24)
    ]
    alone = [await tokens_of(engine, request) for request in requests]
    together = {}

    async def join(index):
        await trio.sleep(rng.random() * 0.05)
        together[index] = await tokens_of(engine, requests[index])

    async with trio.open_nursery() as nursery:
        for index in range(len(requests)):
            nursery.start_soon(join, index)
    assert [together[index] for index in range(len(requests))] == alone
    assert all(len(tokens) == r.max_tokens for tokens, r in zip(alone, requests, strict=True))


async def test_leaving_the_context_frees_the_slot_on_every_stage(engine, cores):
    rng = random.Random(1)
    before = engine.stats.num_steps
    async with engine.generate(generation(rng, 60)) as stream:
        for _ in range(5):
            await stream.receive()
        steps_at_leave = engine.stats.num_steps
        assert any(core.cache.lengths[slot] for core in cores for slot in range(4))
    await settle(engine)
    while engine.stats.num_steps < steps_at_leave + 2:
        await trio.lowlevel.checkpoint()
    assert steps_at_leave > before
    assert all(core.cache.lengths[slot] == 0 for core in cores for slot in range(4))
    assert engine.stats.num_running == 0


async def test_requests_that_come_and_go_never_disturb_the_others(engine):
    rng = random.Random(4)
    steady = generation(rng, 40)
    expected = await tokens_of(engine, steady)

    async def flutter(seed):
        local = random.Random(seed)
        for _ in range(6):
            async with engine.generate(generation(local, 30)) as stream:
                for _ in range(local.randint(0, 6)):
                    await stream.receive()

    async with trio.open_nursery() as nursery:
        for seed in range(5):
            nursery.start_soon(flutter, seed)
        assert await tokens_of(engine, steady) == expected


async def test_a_client_that_never_reads_does_not_hold_up_others(engine):
    rng = random.Random(2)
    async with engine.generate(generation(rng, 50)):
        assert len(await tokens_of(engine, generation(rng, 50))) == 50


async def test_a_client_that_stops_listening_before_it_leaves_harms_nobody(engine):
    rng = random.Random(2)
    async with engine.generate(generation(rng, 50)) as stream:
        await stream.receive()
        await stream.aclose()
        assert len(await tokens_of(engine, generation(rng, 10))) == 10


async def test_the_last_output_says_why_it_is_the_last(engine):
    rng = random.Random(3)
    request = generation(rng, 10)
    async with engine.generate(request) as stream:
        outputs = [output async for output in stream]
    assert [output.finish for output in outputs[:-1]] == [None] * 9
    assert outputs[-1].finish is FinishReason.LENGTH
    stop = Generation(request.prompt_ids, 10, frozenset({outputs[4].token_id}), request.sampling)
    async with engine.generate(stop) as stream:
        outputs = [output async for output in stream]
    assert outputs[-1].finish is FinishReason.EOS


async def test_logprobs_come_with_the_tokens_that_asked(engine):
    rng = random.Random(5)
    async with engine.generate(generation(rng, 5, logprobs=3)) as stream:
        outputs = [output async for output in stream]
    for output in outputs:
        assert output.logprob is not None
        assert len(output.top) == 3
        # Greedy: the chosen token is the likeliest.
        assert output.top[0][0] == output.token_id


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "seed": 6, "logprobs": 4},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.3},
        {"temperature": 1.0, "seed": 7, "logit_bias": {5: 4.0, 10**6: 1.0}, "logprobs": 0},
    ],
    ids=str,
)
async def test_a_token_drawn_by_the_last_stage_is_the_one_drawn_here(engine, sampling):
    drawn = generation(random.Random(13), 25, **sampling)
    chosen = replace(drawn, processors=(lambda token_ids, logits: logits,))
    assert drawn.want.result is Result.DRAWN
    assert chosen.want == Want.LOGITS
    outputs = []
    for request in (drawn, chosen):
        async with engine.generate(request) as stream:
            outputs.append([output async for output in stream])
    for there, here in zip(*outputs, strict=True):
        assert there.token_id == here.token_id
        assert (
            (there.logprob is None) is (here.logprob is None) is (drawn.sampling.logprobs is None)
        )
        assert there.logprob is None or there.logprob == pytest.approx(here.logprob, rel=1e-6)
        assert [token_id for token_id, _ in there.top] == [token_id for token_id, _ in here.top]
        assert dict(there.top) == pytest.approx(dict(here.top), rel=1e-6)


@pytest.mark.parametrize(
    ("request_", "want"),
    [
        (SamplingParams(seed=1), Want.TOKEN),
        (SamplingParams(temperature=0.5), Want.DRAWN),
        (SamplingParams(logprobs=0), Want(Result.DRAWN, 1, 0, 1)),
        (SamplingParams(logprobs=255), Want(Result.DRAWN, 1, 255, 1)),
        (SamplingParams(logprobs=256), Want.LOGITS),  # more than a header can name
        (SamplingParams(logit_bias=dict.fromkeys(range(MAX_BIASES), 1.0)), Want.DRAWN),
        (SamplingParams(allowed_token_ids=(1, 2)), Want.LOGITS),
        (SamplingParams(temperature=0.5, chooser=ChooserSpec("mirostat")), Want.LOGITS),
    ],
)
def test_logits_travel_only_where_nothing_less_will_do(request_, want):
    assert Generation((1,), 1, frozenset(), request_).want == want


class Overflowing(Yielding):
    """Its last stage has no numbers for whoever owns a slot."""

    def __init__(self, local, cores, slot):
        super().__init__(local)
        self._values, self._slot = cores[-1].cache.values, slot

    async def receive(self):
        for layer in self._values:
            layer[self._slot] = np.nan
        return await super().receive()


@pytest.mark.parametrize(
    ("sampling", "has_processor"),
    [({}, False), ({"temperature": 1.0}, False), ({"logprobs": 2}, False), ({}, True)],
    ids=str,
)
async def test_a_model_without_numbers_ends_the_request_and_no_other(
    shards, nursery, sampling, has_processor
):
    cores = new_cores(shards)
    engine = PipelineEngine(LIMITS)
    nursery.start_soon(engine.run, Overflowing(LocalPipeline(cores), cores, 0))
    rng = random.Random(14)
    doomed, steady = generation(rng, 30, **sampling), generation(rng, 30)
    if has_processor:
        doomed = replace(doomed, processors=(lambda token_ids, logits: logits,))

    async with engine.generate(doomed) as stream:  # in the first slot, for it came first
        found = await tokens_of(engine, steady)
        with pytest.raises(RequestFailed, match="no token can be chosen"):
            [output async for output in stream]
    assert len(found) == 30
    assert engine.failure is None


async def test_a_lone_text_ends_where_the_model_has_no_numbers(shards):
    cores = new_cores(shards)
    engine = PipelineEngine(LIMITS)
    heard = []
    engine.submit(generation(random.Random(1), 9), heard.append)
    await engine.drain(Overflowing(LocalPipeline(cores), cores, 0))
    assert isinstance(heard.pop(), RequestFailed)
    assert len(heard) == 1  # the prompt's, computed before


async def test_processors_of_the_callers_own_decide_what_may_be_chosen(engine):
    rng = random.Random(7)
    plain = generation(rng, 12)
    greedy = await tokens_of(engine, plain)
    seen = []

    def ban(token_ids, logits):
        seen.append(tuple(token_ids))
        changed = logits.copy()
        changed[greedy] = -np.inf
        return changed

    def only_even(token_ids, logits):
        changed = logits.copy()
        changed[1::2] = -np.inf
        return changed

    banned = await tokens_of(engine, replace(plain, processors=(ban, only_even)))
    assert not set(banned) & set(greedy)
    assert all(token_id % 2 == 0 for token_id in banned)
    assert seen[3] == (*plain.prompt_ids, *banned[:3])
    assert await tokens_of(engine, plain) == greedy


async def test_a_prompt_that_cannot_fit_is_refused_before_anything_runs(engine):
    with pytest.raises(PromptError):
        async with engine.generate(Generation(tuple(range(200)), 1, frozenset(), SamplingParams())):
            raise AssertionError("entered")


async def test_a_pipeline_failure_reaches_every_open_request(cores, nursery):
    engine = PipelineEngine(LIMITS)

    async def run():
        try:
            await engine.run(Breaking(LocalPipeline(cores), 5))
        except SessionError as error:
            engine.fail(error)

    nursery.start_soon(run)
    rng = random.Random(6)
    with pytest.raises(SessionError, match="stage 1 is lost"):
        await tokens_of(engine, generation(rng, 50))
    with pytest.raises(SessionError, match="stage 1 is lost"):
        await tokens_of(engine, generation(rng, 5))


async def test_requests_survive_any_number_of_losses_token_for_token(shards, engine):
    """Each time either stage begins with nothing; the other one keeps what is certain."""
    rng = random.Random(8)
    requests = [
        generation(rng, 15, temperature=temperature, seed=3) for temperature in (0.0, 0.0, 0.8, 0.8)
    ]
    expected = [await tokens_of(engine, request) for request in requests]
    failing = PipelineEngine(LIMITS)
    losses = []

    async def run():
        cores = new_cores(shards)
        while True:
            try:
                await failing.run(Breaking(LocalPipeline(cores), rng.randint(2, 6)))
            except SessionError:
                victim = len(losses) % 3
                losses.append(victim)
                cores = mended(failing.scheduler, cores, shards, victim)

    found = {}

    async def collect(index):
        found[index] = await tokens_of(failing, requests[index])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        async with trio.open_nursery() as clients:
            for index in range(len(requests)):
                clients.start_soon(collect, index)
        nursery.cancel_scope.cancel()
    assert [found[index] for index in range(len(requests))] == expected
    assert set(losses) == {0, 1, 2}


def mended(scheduler, cores, shards, victim):
    """New cores in the place of `victim`, 2 standing for both, with their KV state rebuilt."""
    fresh = new_cores(shards)
    lengths = scheduler.rewind()
    first, last = fresh if victim == 2 else [
        fresh[idx] if idx == victim else core for idx, core in enumerate(cores)
    ]  # fmt: skip
    for core in {first, last} & set(cores):
        core.rewind(lengths)
    if first in fresh:
        for step in scheduler.replay(1 if victim == 2 else 0):
            tensors = first.step(step.header, (token_ids_to_wire(step.token_ids),))
            if victim == 2:
                assert last.step(step.header, tensors) == ()
    elif last in fresh:
        for header, tensors in first.replay(1):
            assert last.step(header, tensors) == ()
    for core in (first, last):
        assert list(core.cache.lengths) == lengths
    return [first, last]


async def test_a_processor_that_fails_costs_its_own_request_alone(engine):
    rng = random.Random(9)
    calls = []

    def process(token_ids, logits):
        calls.append(1)
        raise ZeroDivisionError

    steady = generation(rng, 30)
    doomed = replace(generation(rng, 30, temperature=1.0, seed=1), processors=(process,))
    expected = await tokens_of(engine, steady)

    async def fail():
        with pytest.raises(RequestFailed, match="ZeroDivisionError"):
            await tokens_of(engine, doomed)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        assert await tokens_of(engine, steady) == expected
    assert calls == [1]


class Poisoned(Yielding):
    """Is lost whenever one token is in a step."""

    def __init__(self, local, poison):
        super().__init__(local)
        self._poison = poison

    async def receive(self):
        result = await super().receive()
        if self._poison in result.token_ids:
            raise SessionError("stage 1 is lost")
        return result


async def test_a_request_that_breaks_the_stages_every_time_ends_alone(shards, engine):
    rng = random.Random(12)
    requests = [generation(rng, 30) for _ in range(4)]
    expected = [await tokens_of(engine, request) for request in requests]
    others = {token for tokens in expected[:3] for token in tokens}
    poison = next(token for token in expected[3] if token not in others)
    poisoned = PipelineEngine(replace(LIMITS, num_stages=2))
    num_losses = 0

    async def run():
        nonlocal num_losses
        cores = new_cores(shards)
        while True:
            try:
                await poisoned.run(Poisoned(LocalPipeline(cores), poison))
            except SessionError:
                num_losses += 1
                cores = mended(poisoned.scheduler, cores, shards, 2)

    found = {}

    async def collect(index):
        async with poisoned.generate(requests[index]) as stream:
            found[index] = []
            async for output in stream:
                found[index].append(output.token_id)

    async def fail():
        with pytest.raises(RequestFailed, match="whenever"):
            await collect(3)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        async with trio.open_nursery() as clients:
            for index in range(3):
                clients.start_soon(collect, index)
            clients.start_soon(fail)
        assert await tokens_of(poisoned, requests[0]) == expected[0]
        nursery.cancel_scope.cancel()
    assert [found[index] for index in range(3)] == expected[:3]
    assert found[3] == expected[3][: expected[3].index(poison)]
    assert num_losses == 4
    assert poisoned.stats.num_running == 0


async def test_a_chooser_of_the_callers_own_is_made_for_each_request(engine):
    made = []

    class Second:
        """Takes the second most likely token each time."""

        def __init__(self):
            made.append(self)
            self.num_asked = 0

        def choose(self, final):
            self.num_asked += 1
            return int(final.ids[np.argsort(-final.probabilities)[1]])

    rng = random.Random(13)
    plain = generation(rng, 8, temperature=1.0)
    own = replace(plain, chooser=Second)
    first = await tokens_of(engine, own)
    assert await tokens_of(engine, own) == first
    assert [each.num_asked for each in made] == [8, 8]
    assert first != await tokens_of(engine, replace(plain, sampling=SamplingParams()))


async def test_masks_hold_for_every_token(engine):
    rng = random.Random(14)
    allowed = tuple(range(40, 60))
    tokens = await tokens_of(engine, generation(rng, 12, allowed_token_ids=allowed))
    assert set(tokens) <= set(allowed)
    assert len(tokens) == 12


async def test_a_text_has_its_least_length(engine):
    rng = random.Random(15)
    plain = generation(rng, 12)
    (end, *_) = await tokens_of(engine, plain)
    ending = replace(plain, eos_token_ids=frozenset({end}))
    assert await tokens_of(engine, ending) == [end]
    longer = replace(ending, sampling=SamplingParams(min_tokens=5))
    assert len(await tokens_of(engine, longer)) > 5


async def test_what_cannot_be_had_is_refused_before_anything_runs(engine):
    plain = generation(random.Random(16), 12)
    with pytest.raises(InputError, match="min_tokens is 13"):
        replace(plain, sampling=SamplingParams(min_tokens=13))
    unknown = SamplingParams(temperature=1.0, chooser=ChooserSpec("dice"))
    with pytest.raises(InputError, match="dice"):
        async with engine.generate(replace(plain, sampling=unknown)):
            raise AssertionError("entered")
    assert not engine.scheduler.has_work
