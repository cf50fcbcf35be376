"""Behind a door a text is what it is on a pipeline of one's own, whatever the door forgets."""

import itertools

import pytest

from pipeline.codecs.gaussian_noise import GaussianNoise
from pipeline.doors.door_session import DoorSession
from pipeline.doors.messages import DoorError, DoorFault
from pipeline.engine.limits import Limits
from pipeline.errors import InputError, SessionError
from pipeline.orchestrator.client_ends import ClientEnds
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.sampling.params import SamplingParams
from pipeline.stage.step_executor import StageCore
from tests.pipeline.doors.rig import (
    LIMITS,
    PROMPT,
    Model,
    Wire,
    generate,
    model,
    wired,
)
from tests.pipeline.oracles import smollm2_dir

__all__ = ["model", "smollm2_dir"]

SAMPLING = [SamplingParams(), SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.2)]


@pytest.fixture(scope="module", params=SAMPLING, ids=["greedy", "drawn"])
def sampling(request):
    return request.param


async def ordinary(model, sampling, num_tokens=12):
    core = StageCore(model.whole(), LIMITS.for_session(model.codec))
    return await generate(LocalPipeline([core]), sampling=sampling, num_tokens=num_tokens)


async def test_64_tokens_are_those_of_an_ordinary_pipeline(model, sampling):
    expected = await ordinary(model, sampling, 64)
    async with model.door() as door:
        pipeline = model.pipeline(door)
        assert await generate(pipeline, sampling=sampling, num_tokens=64) == expected
        assert pipeline.stats.num_handshakes == 1
    assert len(set(expected)) > 2


async def test_a_second_request_of_the_session_begins_where_the_first_did(model):
    async with model.door(num_sessions=1) as door:
        pipeline = model.pipeline(door)
        first = await generate(pipeline)
        assert await generate(pipeline) == first
        await pipeline.end()
        assert await generate(model.pipeline(door, name="another")) == first


@pytest.mark.parametrize("tokens", [1, 5, 16])
async def test_prompts_go_in_requests_that_the_transport_takes(model, tokens):
    expected = await ordinary(model, SAMPLING[0])
    room = tokens * model.codec.hidden_dim * 4 + 16 + 256
    async with wired(model) as wire:
        assert await generate(model.pipeline(wire, max_body_bytes=room)) == expected
    sizes = [len(each.cloaked_embedding) for each in wire.requests]
    assert max(sizes) <= room
    assert sum(each.shape[0] for each in wire.requests) == len(PROMPT) + 11
    assert len(sizes) == 11 + sum(-(-chunk // tokens) for chunk in (16, 16, 16, 9))


def test_a_transport_without_room_for_a_token_is_refused(model):
    with pytest.raises(InputError, match="no room for a token's 256"):
        model.pipeline(None, max_body_bytes=400)


class Restarting(Wire):
    """Doors one after another, each with keys of its own; the next one after some requests."""

    def __init__(self, doors, after):
        self._doors = itertools.cycle(doors)
        self._after = after
        super().__init__(next(self._doors))

    async def infer(self, request):
        if len(self.requests) in self._after:
            self.requests.append(None)
            self.door = next(self._doors)
        return await super().infer(request)


@pytest.mark.parametrize("after", [{0}, {1}, {3}, {7, 15, 16}], ids=str)
async def test_what_a_door_forgets_is_rebuilt_from_tokens(model, sampling, after):
    expected = await ordinary(model, sampling)
    async with model.door() as first, model.door() as second:
        wire = Restarting([first, second], after)
        pipeline = model.pipeline(wire)
        assert await generate(pipeline, sampling=sampling) == expected
    assert min(1, len(after - {0})) <= pipeline.stats.num_failovers <= len(after)
    assert 2 <= pipeline.stats.num_handshakes <= 1 + len(after)


class Failing(Wire):
    """A door that cannot be reached for some requests, before or after it has heard of them."""

    def __init__(self, door, fault, *, heard, times):
        super().__init__(door)
        self._fault, self._heard, self._left = fault, heard, times

    async def infer(self, request):
        if len(self.requests) == 6 and self._left:
            self._left -= 1
            if self._heard:
                await self.door.infer(request)
            raise self._fault
        return await super().infer(request)


@pytest.mark.parametrize("heard", [True, False], ids=["answer lost", "request lost"])
@pytest.mark.parametrize(
    "fault",
    [
        DoorError(DoorFault.UNAVAILABLE, "not now"),
        DoorError(DoorFault.BUSY, "not now"),
        SessionError("the door is lost"),
    ],
    ids=str,
)
async def test_a_step_is_sent_again_until_it_is_answered(model, fault, heard, autojump_clock):
    expected = await ordinary(model, SAMPLING[0])
    async with model.door() as door:
        pipeline = model.pipeline(Failing(door, fault, heard=heard, times=4))
        assert await generate(pipeline) == expected
        assert pipeline.stats.num_failovers == 0


@pytest.mark.parametrize(
    "fault", [each for each in DoorFault if each is not DoorFault.WRONG_KEY], ids=str
)
async def test_one_clear_error_where_it_does_not_pass(model, fault, autojump_clock):
    async with model.door() as door:
        pipeline = model.pipeline(
            Failing(door, DoorError(fault, "not now"), heard=False, times=10_000)
        )
        with pytest.raises(SessionError, match=r"the door (refuses: not now|forgets the session)"):
            await generate(pipeline)


async def test_keys_that_change_all_the_time_are_given_up(model):
    async with model.door() as door, model.door() as other:

        class Swapping(Wire):
            async def infer(self, request):
                self.door = other if self.door is door else door
                return await super().infer(request)

        with pytest.raises(SessionError, match="sealed to another worker's key"):
            await generate(model.pipeline(Swapping(door)))


@pytest.mark.parametrize("wire", ["F16", "I8", "I5"])
async def test_smaller_wires_go_through_a_door(tiny_model, wire):
    model = Model(tiny_model, wire)
    core = StageCore(model.shard, LIMITS.for_session(model.codec, has_client_ends=True))
    local = LocalPipeline([core], ClientEnds(model.own_part, model.codec))
    expected = await generate(local)
    async with model.door() as door:
        assert await generate(model.pipeline(door, max_body_bytes=1000)) == expected


async def test_what_is_sent_again_has_the_noise_it_had(model, monkeypatch):
    """Attack: rows rebuilt under fresh noise, again and again, average to the rows without any."""
    sent = {}
    seal = DoorSession.seal

    def spying(self, position, tensors, num_rows):
        for at, row in enumerate(model.codec.decode(tensors), position):
            sent.setdefault(at, set()).add(row.tobytes())
        return seal(self, position, tensors, num_rows)

    monkeypatch.setattr(DoorSession, "seal", spying)
    noise = GaussianNoise(0.1, 7.5, model.codec.hidden_dim, bytes(32))
    async with model.door() as first, model.door() as second:
        wire = Restarting([first, second], {3, 8})
        pipeline = model.pipeline(wire, noise=noise)
        await generate(pipeline)
    assert pipeline.stats.num_failovers >= 2
    assert len(sent) == len(PROMPT) + 11
    assert {len(rows) for rows in sent.values()} == {1}


@pytest.mark.slow
async def test_smollm2_says_behind_a_door_what_it_says_in_one_process(smollm2_dir):
    model = Model(smollm2_dir)
    limits = Limits(1, 256, chunk_tokens=64)
    prompt = tuple(range(1000, 1100))
    core = StageCore(model.whole(), limits.for_session(model.codec))
    expected = await generate(LocalPipeline([core]), prompt=prompt, num_tokens=64, limits=limits)
    async with model.door(max_seq_len=256) as door, model.door(max_seq_len=256) as other:
        wire = Restarting([door, other], {20})
        pipeline = model.pipeline(wire)
        found = await generate(pipeline, prompt=prompt, num_tokens=64, limits=limits)
    assert found == expected
    assert pipeline.stats.num_failovers == 1
