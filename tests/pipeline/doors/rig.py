"""A door in this process, its client, and somebody between them who looks on or meddles."""

from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
import pytest

from pipeline.doors.door_pipeline import DoorOptions, DoorPipeline
from pipeline.doors.door_session import DoorPolicy, DoorSession, SessionName
from pipeline.doors.handler import DoorSetup, open_door
from pipeline.doors.messages import DoorError
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.models.config import load_config
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.orchestrator.client_ends import ClientEnds
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.batch import Segment
from pipeline.sampling.params import SamplingParams
from transport.attestation.dev_authority import DevAttester, DevAuthority, dev_verifier

SECRET = bytes(range(32))
LIMITS = Limits(1, 128, chunk_tokens=16)


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Wire:
    """A Door that is another one: keeps what passes, and changes it where a test says so."""

    def __init__(self, door):
        self.door = door
        self.requests, self.answers, self.keys = [], [], []
        self.change_request = self.change_answer = lambda each: each

    async def infer(self, request):
        request = self.change_request(request)
        self.requests.append(request)
        self.answers.append(await self.door.infer(request))
        return self.change_answer(self.answers[-1])

    async def attest(self, request):
        self.keys.append(await self.door.attest(request))
        return self.keys[-1]

    def recording(self):
        """All bytes and texts that have passed."""
        seen = bytearray()
        for each in (*self.requests, *self.answers, *self.keys):
            for name in each.__slots__:
                value = getattr(each, name)
                seen += value if isinstance(value, bytes) else repr(value).encode()
        return bytes(seen)


@dataclass
class Model:
    """What both sides hold of a model, and what they believe."""

    directory: object
    wire: str = "F32"
    kernels: str = "auto"
    authority: DevAuthority = field(default_factory=lambda: DevAuthority.create(datetime.now(UTC)))

    def __post_init__(self):
        options = PlanOptions(1, split="client", wire_dtype=self.wire)
        self.manifest = plan(self.directory, options)
        self.config = load_config(self.directory)
        self.codec = self.manifest.activation_spec.codec
        self.shard = self._load(0, self.config.num_layers, NO_ENDS)
        self.own_part = self._load(0, 0, BOTH_ENDS)
        verifier = dev_verifier(self.authority.root_cert, None)
        self.policy = DoorPolicy(self.manifest.core_hash(), (verifier,))

    def _load(self, start, end, ends=None):
        return load_shard(
            self.directory, self.config, start, end, ends=ends, kernels=self.kernels,
            expected_hashes=None,
        )  # fmt: skip

    def whole(self):
        return self._load(0, self.config.num_layers)

    def setup(self, **changes):
        attester = DevAttester(self.authority, {})
        made = DoorSetup(self.manifest, self.shard, attester, num_sessions=2, max_seq_len=128)
        return replace(made, **changes)

    def door(self, **changes):
        """A door as a context."""
        return open_door(self.setup(**changes))

    async def session(self, door, name="chat", secret=SECRET):
        """A session as its client has it, once the door has shown its key."""
        question = self.policy.ask()
        key = self.policy.answered(question, await door.attest(question))
        return DoorSession(SessionName.of(name, secret), self.policy, self.codec, key)

    def rows(self, num_tokens, seed=1):
        """Activations as they are sent."""
        rows = np.random.default_rng(seed).standard_normal(
            (num_tokens, self.codec.hidden_dim), np.float32
        )
        return self.codec.encode(rows)

    def pipeline(
        self,
        door,
        *,
        patience=5.0,
        max_body_bytes=1 << 20,
        name="chat",
        noise=None,
        remembered=None,
    ):
        options = DoorOptions(
            SessionName.of(name, SECRET), self.policy, patience, max_body_bytes, remembered
        )
        return DoorPipeline(door, options, ClientEnds(self.own_part, self.codec, noise), self.codec)


@pytest.fixture(scope="session")
def model(tiny_model):
    return Model(tiny_model)


@pytest.fixture
def clock():
    return Clock()


@asynccontextmanager
async def wired(model, **changes):
    """A door behind a wire."""
    async with model.door(**changes) as door:
        yield Wire(door)


PROMPT = tuple(range(40, 97))


async def generate(pipeline, *, prompt=PROMPT, num_tokens=12, sampling=None, limits=LIMITS):
    """The tokens that an engine makes on a pipeline."""
    engine, tokens = PipelineEngine(limits), []
    generation = Generation(prompt, num_tokens, frozenset(), sampling or SamplingParams())
    engine.submit(generation, lambda output: tokens.append(output.token_id))
    await engine.drain(pipeline)
    return tokens


def reference(model, *steps):
    """The last rows of steps (position, tensors), computed straight."""
    cache = model.shard.new_cache(1, 128)
    for position, tensors in steps:
        rows = model.codec.decode(tensors)
        cache.truncate(0, position)
        hidden = model.shard.forward(rows, (Segment(0, position, len(rows)),), cache)
        found = np.array(model.shard.kernels.to_host(hidden)[0])
    return found


@asynccontextmanager
async def begun(model, num_tokens=5, **changes):
    """A door, a session of so many tokens, and its first request and answer."""
    async with model.door(**changes) as door:
        session = await model.session(door)
        request = session.seal(0, model.rows(num_tokens), 1)
        answer = await door.infer(request)
        session.open(answer)
        yield door, session, request, answer


async def refused(door, request, fault):
    with pytest.raises(DoorError) as caught:
        await door.infer(request)
    assert caught.value.fault is fault, caught.value
    return caught.value


async def goes_on(model, door, session, held=5):
    """Whether the session is as it was: its next step gives what it would have."""
    more = model.rows(2, seed=9)
    found = session.open(await door.infer(session.seal(held, more, 2)))
    steps = [(0, model.rows(held)), (held, more)] if held else [(0, more)]
    np.testing.assert_allclose(found, reference(model, *steps)[-2:], rtol=1e-4, atol=1e-5)
