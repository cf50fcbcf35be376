"""A pipeline of two stages in this process, and requests of an engine before it."""

import trio

from pipeline.codecs.registry import make_codec
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.errors import SessionError
from pipeline.protocol.step_limits import token_ids_to_wire
from pipeline.sampling.params import SamplingParams
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.step_executor import StageCore

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


def new_cores(shards):
    limits = LIMITS.for_session(make_codec("F32", 64))
    log = ActivationLog(LIMITS.num_slots, LIMITS.max_seq_len, 64)
    return [StageCore(shards[0], limits, log), StageCore(shards[1], limits)]


def generation(rng, max_tokens=12, **sampling):
    prompt_ids = tuple(rng.randrange(255) for _ in range(rng.randint(1, 60)))
    return Generation(prompt_ids, max_tokens, frozenset(), SamplingParams(**sampling))


async def tokens_of(engine, request):
    async with engine.generate(request) as stream:
        return [output.token_id async for output in stream]


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
