"""A worker in this process, and a test that plays everybody else."""

from contextlib import asynccontextmanager

import trio

from pipeline.agreement.trust_policy import DevTrust
from pipeline.codecs.registry import make_codec
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.links import (
    CONTROL_LIMITS,
    SEND_ONLY_LIMITS,
    ControlLink,
    StepGate,
)
from pipeline.protocol.messages import Broken, Failure, Health, Healthy, Init, Ready
from pipeline.protocol.peer_connections import CONTROL_EPOCH, ORCHESTRATOR, accept_first
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits
from pipeline.protocol.time_limits import TimeLimits
from pipeline.stage.dial_policy import parse_networks
from pipeline.stage.worker import StageWorker
from pipeline.stage.worker_setup import StageSetup
from transport.channel import connect_channel
from transport.dial_and_listen import TcpEndpoint, dial, listen
from transport.handshake import Link, LinkKind, Role, RoleKind
from transport.tensor_frames import DType, Tensor, TensorSpec

LOOPBACK = TcpEndpoint("127.0.0.1", 0)


class Rig:
    """Worker 1 of 2 in this process, and a test that plays everybody else."""

    def __init__(self, model_dir, directory):
        self.directory = directory
        self.manifest = plan(model_dir, PlanOptions(2))
        self.trust, self.worker_trust = (DevTrust.create(directory / "dev") for _ in range(2))
        config = load_config(model_dir)
        stage = self.manifest.stage(1)
        self.shard = load_shard(
            model_dir, config, stage.layer_start, stage.layer_end, expected_hashes=None
        )
        self.epoch = bytes(range(16))
        self.limits = SessionLimits(2, 64, 34, make_codec("F32", 64))

    def init(self, data_out, **changes):
        fields = {
            "epoch": self.epoch,
            "stage_idx": 1,
            "activation_dtype": "F32",
            "hidden_dim": 64,
            "max_seq_len": 64,
            "num_slots": 2,
            "max_step_tokens": 34,
            "data_out": str(data_out),
            "upstream_measurements": {},
            "downstream_measurements": {},
        }
        return Init(**{**fields, **changes})

    @asynccontextmanager
    async def worker(self, **times):
        setup = StageSetup(
            self.manifest,
            1,
            self.shard,
            self.worker_trust,
            "float32",
            1,
            "cpu",
            max_kv_bytes=1 << 24,
            allow_dial=parse_networks(["127.0.0.0/8"]),
            times=TimeLimits(**times),
        )
        with listen(LOOPBACK) as control, listen(LOOPBACK) as data_in:
            async with trio.open_nursery() as nursery:
                self.server = StageWorker(setup)
                nursery.start_soon(self.server.serve, control, data_in)
                self.control_at, self.data_at = control.endpoint, data_in.endpoint
                yield
                nursery.cancel_scope.cancel()

    async def control(self):
        link = Link(
            LinkKind.CONTROL,
            ORCHESTRATOR,
            Role(RoleKind.STAGE, 1),
            self.manifest.core_hash(),
            CONTROL_EPOCH,
        )
        credentials = self.trust.toward(link.responder, {})
        return ControlLink(
            await connect_channel(await dial(self.control_at), link, credentials, CONTROL_LIMITS)
        )

    def data_link(self, initiator, responder):
        return Link(LinkKind.DATA, initiator, responder, self.manifest.core_hash(), self.epoch)

    async def dial_upstream(self):
        """A channel that plays stage 0."""
        stages = [Role(RoleKind.STAGE, idx) for idx in range(2)]
        link = self.data_link(stages[0], stages[1])
        credentials = self.trust.toward(stages[1], {})
        return await connect_channel(await dial(self.data_at), link, credentials, SEND_ONLY_LIMITS)

    async def join(self, results):
        """The worker's two data channels of this epoch, and the gate of its results."""
        upstream = await self.dial_upstream()
        gate = StepGate(self.limits, lambda header, specs: None)
        link = self.data_link(Role(RoleKind.STAGE, 1), ORCHESTRATOR)
        limits = gate.frame_limits(1 << 20)
        downstream = await accept_first(results, link, self.trust, {}, limits)
        return upstream, downstream, gate

    @asynccontextmanager
    async def session(self):
        """An opened session: its control link, and the channel that plays stage 0."""
        with listen(LOOPBACK) as results:
            control = await self.control()
            await control.send(self.init(results.endpoint))
            upstream, downstream, _ = await self.join(results)
            message = await control.receive()
            assert isinstance(message, Ready)
            try:
                yield control, upstream
            finally:
                for channel in (control, upstream, downstream):
                    with trio.move_on_after(1, shield=True):
                        await channel.aclose()


def hidden(num_tokens, width=64):
    data = memoryview(bytes(num_tokens * width * 4))
    return Tensor(TensorSpec(DType.F32, (num_tokens, width)), data)


def step(*segments, kind=StepKind.STEP):
    want = Want.NOTHING if kind is StepKind.TRUNCATE else Want.TOKEN
    return StepHeader(kind, 0, segments, (want,) * len(segments))


async def failure_of(control):
    with trio.fail_after(60):
        while True:
            message = await control.receive()
            if isinstance(message, Failure | Broken):
                return message


async def figures_of(control):
    await control.send(Health(sequence=7))
    with trio.fail_after(60):
        answer = await control.receive()
    assert isinstance(answer, Healthy)
    assert answer.sequence == 7
    return answer.figures


async def settled(control, num_steps):
    with trio.fail_after(60):
        while True:
            figures = await figures_of(control)
            if figures.num_steps == num_steps:
                return figures
