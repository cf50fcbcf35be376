"""Stages against orchestrators and neighbours that are authentic and misbehave."""

import gc
import socket
import weakref
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio

import pipeline.stage.neighbours
import pipeline.stage.session
import pipeline.stage.worker
from pipeline.agreement.manifest import StageEndpoint, TcpAddress
from pipeline.agreement.trust import DevTrust, UserTrust, create_identity, load_identity
from pipeline.codecs.registry import make_codec
from pipeline.engine.scheduler import Limits
from pipeline.errors import InputError, PolicyError, SessionError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.opening import PipelineOptions, open_pipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import (
    CONTROL_LIMITS,
    SEND_ONLY_LIMITS,
    ControlLink,
    StepGate,
    receive_step,
    send_step,
)
from pipeline.protocol.messages import (
    Broken,
    Done,
    Failure,
    Health,
    Healthy,
    Init,
    Ready,
    Rewind,
    Shutdown,
    StageFigures,
    Start,
    Waiting,
)
from pipeline.protocol.peers import CONTROL_EPOCH, ORCHESTRATOR, accept_first
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import CLEAR_SENTINEL, SessionLimits
from pipeline.protocol.wants import Want
from pipeline.stage.dialing import parse_networks
from pipeline.stage.setup import StageSetup
from pipeline.stage.worker import StageWorker
from transport.channel import connect_channel
from transport.endpoint import TcpEndpoint, dial, listen
from transport.errors import HandshakeError
from transport.frames import DType, Tensor, TensorSpec
from transport.handshake import Link, LinkKind, Role, RoleKind

NOTHING = StageFigures(**dict.fromkeys(StageFigures.model_fields, 0))
LOOPBACK = TcpEndpoint("127.0.0.1", 0)


class Rig:
    """Worker 1 of 2 in this process, and a test that plays everybody else."""

    def __init__(self, model_dir, directory):
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
    async def worker(self):
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
        )
        with listen(LOOPBACK) as control, listen(LOOPBACK) as data_in:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(StageWorker(setup).serve, control, data_in)
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


@pytest.fixture
def rig(tiny_model, tmp_path):
    return Rig(tiny_model, tmp_path)


def hidden(num_tokens, width=64):
    data = memoryview(bytes(num_tokens * width * 4))
    return Tensor(TensorSpec(DType.F32, (num_tokens, width)), data)


def step(*segments, kind=StepKind.STEP):
    want = Want.NOTHING if kind is StepKind.TRUNCATE else Want.TOKEN
    return StepHeader(kind, 0, segments, (want,) * len(segments))


async def failure_of(control):
    with trio.fail_after(5):
        while True:
            message = await control.receive()
            if isinstance(message, Failure | Broken):
                return message


@pytest.mark.parametrize(
    ("header", "tensor", "word"),
    [
        (step(), hidden(0), "no segments"),
        (step(Segment(2, 0, 1)), hidden(1), "slot 2"),
        (step(Segment(0, 64, 1)), hidden(1), "position 65"),
        (step(Segment(0, 5, 1)), hidden(1), "5"),
        (step(Segment(0, 0, 1), Segment(0, 1, 1)), hidden(2), "twice"),
        (step(Segment(0, 0, 2)), hidden(1), "expected"),
        (step(Segment(0, 0, 1)), hidden(1, 32), "expected"),
        (step(Segment(0, 0, 40)), hidden(40), "the limit is 34"),
        (step(Segment(0, 0, 0)), hidden(0), "0 tokens"),
    ],
)
async def test_a_step_that_does_not_fit_ends_the_session_and_not_the_worker(
    rig, header, tensor, word
):
    async with rig.worker():
        async with rig.session() as (control, upstream):
            await send_step(upstream, header, (tensor,))
            failure = await failure_of(control)
            assert word in failure.detail
        async with rig.session():
            pass  # the worker serves on


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_slots": 1024, "max_seq_len": 4096}, "KV memory"),
        ({"max_step_tokens": 1 << 20}, "1048576"),
        ({"max_seq_len": 1 << 20}, "1048576"),
        ({"stage_idx": 0}, "init is for"),
        ({"hidden_dim": 32}, "init is for"),
        ({"version": 1}, "version 1"),
        ({"data_out": "10.0.0.5:80"}, "may not dial tcp:10.0.0.5:80; allow it with --allow-dial"),
        ({"data_out": "unix:/run/docker.sock"}, "may not dial unix:/run/docker.sock; name it"),
        ({"data_out": "vsock:3:80"}, "may not dial vsock:3:80; name it"),
        ({"data_out": "nowhere"}, "cannot dial"),
    ],
)
async def test_an_init_that_asks_too_much_is_refused_with_the_values(rig, changes, word):
    async with rig.worker():
        control = await rig.control()
        await control.send(rig.init(**{"data_out": "127.0.0.1:1"} | changes))
        failure = await failure_of(control)
        assert failure.code == "refused"
        assert word in failure.detail
        await control.aclose()
        async with rig.session():
            pass


@pytest.mark.parametrize(
    "messages",
    [
        [Start(request_id=1, slot=-5)],
        [Start(request_id=1, slot=2)],
        [Start(request_id=1, slot=0), Start(request_id=1, slot=1)],
        [Start(request_id=i, slot=0) for i in range(3)],
        [Healthy(sequence=1, figures=NOTHING)],
    ],
)
async def test_control_messages_out_of_order_are_refused(rig, messages):
    async with rig.worker(), rig.session() as (control, _):
        for message in messages:
            await control.send(message)
        assert (await failure_of(control)).code == "failed"


async def figures_of(control):
    await control.send(Health(sequence=7))
    with trio.fail_after(5):
        answer = await control.receive()
    assert isinstance(answer, Healthy)
    assert answer.sequence == 7
    return answer.figures


async def test_requests_come_and_go_within_the_sessions_slots(rig):
    async with rig.worker(), rig.session() as (control, _):
        await control.send(Start(request_id=1, slot=0))
        await control.send(Start(request_id=2, slot=1))
        await control.send(Done(request_id=1))
        await control.send(Start(request_id=3, slot=0))
        await figures_of(control)
        await control.send(Start(request_id=4, slot=1))
        assert (await failure_of(control)).code == "failed"


async def test_health_tells_what_a_stage_holds_and_has_done(rig):
    async with rig.worker():
        async with rig.session() as (control, upstream):
            idle = await figures_of(control)
            assert (idle.num_slots, idle.slots_in_use, idle.kv_tokens, idle.num_steps) == (
                2,
                0,
                0,
                0,
            )
            # 2 layers, keys and values, 2 slots of 64 tokens, 2 heads of 16 floats.
            assert idle.kv_bytes == 2 * 2 * 2 * 64 * 2 * 16 * 4
            assert idle.num_handshakes == 3
            await send_step(upstream, step(Segment(0, 0, 5), Segment(1, 0, 3)), (hidden(8),))
            await send_step(upstream, step(Segment(1, 3, 1)), (hidden(1),))
            busy = await settled(control, num_steps=2)
            assert (busy.slots_in_use, busy.kv_tokens, busy.num_tokens) == (2, 9, 9)
            assert busy.last_batch == 1
            assert busy.compute_ns > 0
            assert busy.crypto_ns > 0
            assert busy.bytes_received - idle.bytes_received > 9 * 64 * 4
            assert busy.bytes_sent > idle.bytes_sent
            clear = step(Segment(0, 0, 0), Segment(1, 0, 0), kind=StepKind.TRUNCATE)
            await send_step(upstream, clear, (CLEAR_SENTINEL,))
            cleared = await settled(control, num_steps=3)
            assert (cleared.slots_in_use, cleared.kv_tokens, cleared.num_tokens) == (0, 0, 9)
        control = await rig.control()
        between = await figures_of(control)
        await control.aclose()
        assert (between.num_slots, between.num_steps, between.num_handshakes) == (0, 3, 4)
        assert between.bytes_sent >= cleared.bytes_sent
        assert between.uptime_ns > cleared.uptime_ns


async def settled(control, num_steps):
    with trio.fail_after(5):
        while True:
            figures = await figures_of(control)
            if figures.num_steps == num_steps:
                return figures


async def test_a_name_that_stands_for_another_address_when_it_is_dialed_is_refused(
    rig, monkeypatch
):
    """Attack: a name whose owner answers with an allowed address first, with another one later."""
    looked_up = []

    async def getaddrinfo(host, port, **_):
        await trio.lowlevel.checkpoint()
        looked_up.append(host)
        address = "127.0.0.1" if len(looked_up) == 1 else "10.0.0.5"
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))]

    with socket.create_server(("127.0.0.1", 0)) as sock:
        closed_port = sock.getsockname()[1]
    async with rig.worker():
        control = await rig.control()
        monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
        await control.send(rig.init(f"rebinding.example:{closed_port}"))
        failure = await failure_of(control)
        await control.aclose()
    assert failure.code == "refused"
    assert "may not dial tcp:rebinding.example" in failure.detail
    assert len(looked_up) == 2


async def test_a_defect_costs_the_session_and_not_the_worker(rig, monkeypatch):
    async with rig.worker():
        async with rig.session() as (control, upstream):
            with monkeypatch.context() as patch:
                patch.setattr(type(rig.shard), "forward", lambda *_: 1 / 0)
                await send_step(upstream, step(Segment(0, 0, 2)), (hidden(2),))
                failure = await failure_of(control)
            assert "ZeroDivisionError" in failure.detail
        async with rig.session():
            pass


async def test_an_orchestrator_may_take_its_time_before_init(rig, monkeypatch):
    monkeypatch.setattr(pipeline.stage.worker, "SILENCE_SECONDS", 2.0)
    async with rig.worker():
        control = await rig.control()
        for sequence in range(5):
            await trio.sleep(0.5)
            await control.send(Health(sequence=sequence))
            assert (await control.receive()).sequence == sequence
        await control.aclose()
        async with rig.session():
            pass


async def test_a_refusal_reaches_an_orchestrator_that_is_still_talking(rig, monkeypatch):
    monkeypatch.setattr(pipeline.stage.worker, "BUSY_SECONDS", 0.1)
    async with rig.worker(), rig.session():
        second = await rig.control()
        for sequence in range(20):  # the last ones come after the refusal
            await second.send(Health(sequence=sequence))
            await trio.sleep(0.02)
        assert (await failure_of(second)).code == "busy"
        await second.aclose()


async def test_an_orchestrator_that_never_reads_is_silent_too(rig, monkeypatch):
    monkeypatch.setattr(pipeline.stage.session, "SILENCE_SECONDS", 0.5)
    async with rig.worker():
        async with rig.session() as (control, _):
            with trio.move_on_after(2):
                for sequence in range(1_000_000):
                    await control.send(Health(sequence=sequence))
        with trio.fail_after(10):
            async with rig.session():
                pass


async def test_a_stage_says_what_it_waits_for(rig, monkeypatch):
    monkeypatch.setattr(pipeline.stage.neighbours, "WAITING_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        closed_port = sock.getsockname()[1]
    async with rig.worker():
        control = await rig.control()
        await control.send(rig.init(f"127.0.0.1:{closed_port}"))
        with trio.fail_after(5):
            message = await control.receive()
        assert isinstance(message, Waiting)
        assert str(closed_port) in message.detail
        await control.aclose()


class Joined:
    """A session whose data channels can be lost and made again."""

    def __init__(self, rig, control, results):
        self.rig, self.control, self.results = rig, control, results

    async def join(self):
        self.upstream, self.downstream, self.gate = await self.rig.join(self.results)
        assert (await self.said(Ready)).epoch == self.rig.epoch

    async def leave(self):
        for channel in (self.upstream, self.downstream):
            await trio.aclose_forcefully(channel)

    async def rewind(self, lengths, **fields):
        """Leave the old channels once the stage has heard of it, not before."""
        self.rig.epoch = bytes([self.rig.epoch[0] + 1]) * 16
        fields = {"data_out": str(self.results.endpoint), **fields}
        await self.control.send(Rewind(epoch=self.rig.epoch, lengths=lengths, **fields))
        await self.control.send(Health(sequence=1))
        heard = await self.said(Healthy | Failure)
        await self.leave()
        return heard

    async def said(self, kind):
        with trio.fail_after(5):
            while not isinstance(message := await self.control.receive(), kind):
                pass
        return message

    async def run(self, header, tensor):
        await send_step(self.upstream, header, (tensor,))
        with trio.fail_after(5):
            _, tensors = await receive_step(self.downstream, self.gate)
        return bytes(tensors[-1].data)


@pytest.fixture
async def joined(rig):
    async with rig.worker():
        with listen(LOOPBACK) as results:
            control = await rig.control()
            await control.send(rig.init(results.endpoint))
            joined = Joined(rig, control, results)
            await joined.join()
            yield joined
            await joined.leave()
            await control.aclose()


def rows(start, count):
    data = np.random.default_rng(5).standard_normal((64, 64), dtype=np.float32)
    part = np.ascontiguousarray(data[start : start + count])
    return Tensor(TensorSpec(DType.F32, part.shape), part.data.cast("B"))


def logits(slot, position, count):
    return StepHeader(StepKind.STEP, position, (Segment(slot, position, count),), (Want.LOGITS,))


def replay(slot, position, count, until=1, want=Want.NOTHING):
    segment = Segment(slot, position, count)
    return StepHeader(StepKind.REPLAY, position, (segment,), (want,), until=until)


async def test_a_session_outlives_its_channels_and_goes_back_to_what_is_certain(joined):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    expected = await joined.run(logits(0, 5, 1), rows(5, 1))
    await joined.run(logits(1, 0, 3), rows(20, 3))
    await trio.aclose_forcefully(joined.upstream)
    broken = await joined.said(Broken)
    assert (broken.epoch, broken.side) == (joined.rig.epoch, "upstream")
    await joined.rewind([5, 0])
    await joined.join()
    figures = await figures_of(joined.control)
    assert (figures.slots_in_use, figures.kv_tokens) == (1, 5)
    # Slot 0 holds what it held; slot 1 was not named, so it begins anew.
    assert await joined.run(logits(0, 5, 1), rows(5, 1)) == expected
    assert await joined.run(logits(1, 0, 5), rows(0, 5))


async def test_a_rewind_interrupts_a_session_that_sees_nothing_wrong(joined):
    expected = await joined.run(logits(0, 0, 5), rows(0, 5))
    await joined.rewind([0, 0])
    await joined.join()
    assert await joined.run(logits(0, 0, 5), rows(0, 5)) == expected


async def test_a_rewind_names_where_the_neighbour_is_now(joined):
    expected = await joined.run(logits(0, 0, 5), rows(0, 5))
    with listen(LOOPBACK) as elsewhere:
        before, joined.results = joined.results, elsewhere
        before.close()
        await joined.rewind([0, 0])
        await joined.join()
        assert await joined.run(logits(0, 0, 5), rows(0, 5)) == expected


async def test_of_several_rewinds_the_last_one_counts(joined):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    await joined.rewind([4, 0])
    await joined.rewind([3, 0])
    await joined.join()
    assert (await figures_of(joined.control)).kv_tokens == 3


async def test_a_channel_of_an_epoch_that_is_over_is_not_let_in(joined):
    stale = joined.rig.epoch
    await joined.rewind([0, 0])
    current, joined.rig.epoch = joined.rig.epoch, stale
    with pytest.raises(HandshakeError):
        await joined.rig.dial_upstream()
    joined.rig.epoch = current
    await joined.join()


async def test_replayed_steps_rebuild_what_a_slot_held_and_answer_nothing(joined):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    expected = await joined.run(logits(0, 5, 1), rows(5, 1))
    await joined.rewind([0, 0])
    await joined.join()
    await send_step(joined.upstream, replay(0, 0, 5), (rows(0, 5),))
    # The next thing to come is the answer of the step behind the replay.
    assert await joined.run(logits(0, 5, 1), rows(5, 1)) == expected


async def test_a_stage_answers_between_long_steps_that_came_together(joined, monkeypatch):
    monkeypatch.setattr(pipeline.stage.session, "LONG_STEP_NS", 0)
    for position in range(20):
        await send_step(joined.upstream, replay(0, position, 1), (rows(position, 1),))
    assert (await figures_of(joined.control)).num_steps <= 5
    await settled(joined.control, num_steps=20)


@pytest.mark.parametrize(
    ("lengths", "fields", "word"),
    [
        ([6, 0], {}, "holds 5 tokens"),
        ([5, 1], {}, "holds 0 tokens"),
        ([5], {}, "names 1 slots"),
        ([5, 0, 0], {}, "names 3 slots"),
        ([5, 0], {"replay_until": 1}, "replay until stage 1"),
        ([5, 0], {"replay_until": 7}, "replay until stage 7"),
        ([5, 0], {"data_out": "10.0.0.5:80"}, "stage 1 may not dial tcp:10.0.0.5:80"),
    ],
)
async def test_a_rewind_that_cannot_be_is_refused_with_the_values(joined, lengths, fields, word):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    heard = await joined.rewind(lengths, **fields)
    failure = heard if isinstance(heard, Failure) else await joined.said(Failure)
    assert word in failure.detail


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (replay(0, 0, 2), "holds 5 tokens"),
        (replay(0, 5, 2, until=0), "until stage 0"),
        (replay(0, 5, 2, until=2), "until stage 2"),
        (replay(0, 5, 2, want=Want.TOKEN), "wants a result"),
        (replay(0, 40, 30), "position 70"),
    ],
)
async def test_a_replay_that_does_not_continue_the_slot_is_refused(joined, header, word):
    await joined.run(logits(0, 0, 5), rows(0, 5))
    await send_step(joined.upstream, header, (rows(0, header.num_tokens),))
    message = await failure_of(joined.control)
    assert word in message.detail


async def test_an_ended_sessions_kv_memory_is_gone_without_a_collection(rig, monkeypatch):
    caches = []
    new_cache = type(rig.shard).new_cache

    def tracked(shard, *arguments):
        cache = new_cache(shard, *arguments)
        # The cache has no weak references; its tensors have.
        caches.append(weakref.ref(cache.keys[0]))
        return cache

    monkeypatch.setattr(type(rig.shard), "new_cache", tracked)
    gc.disable()
    try:
        async with rig.worker():
            for _ in range(3):
                async with rig.session() as (control, _):
                    await control.send(Shutdown())
                await trio.sleep(0.1)
            assert len(caches) == 3
            assert [cache() for cache in caches[:2]] == [None, None]
    finally:
        gc.enable()


async def test_a_stage_lost_while_another_is_awaited_is_named_at_once(rig):
    async with rig.worker():
        absent = TcpAddress(type="tcp", addr="127.0.0.1:1")
        present = TcpAddress(type="tcp", addr=f"127.0.0.1:{rig.control_at.port}")
        out = TcpAddress(type="tcp", addr="127.0.0.1:0")
        stages = tuple(
            stage.model_copy(
                update={"endpoint": StageEndpoint(control=control, data_in=absent, data_out=out)}
            )
            for stage, control in zip(rig.manifest.stages, (absent, present), strict=True)
        )
        manifest = rig.manifest.model_copy(update={"stages": stages})
        options = PipelineOptions(Limits(1, 64), 20, LOOPBACK, hang_seconds=0.5)

        async def expect_loss():
            with pytest.raises(SessionError, match="stage 1 is lost"):
                async with open_pipeline(manifest, rig.trust, options, lambda line: None):
                    raise AssertionError("stage 0 does not exist")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_loss)
            with trio.fail_after(10):
                while len(control_links()) < 2:  # noqa: ASYNC110 - both ends: it has no event
                    await trio.sleep(0.01)
            break_control_channels()


def control_links():
    found = [each for each in gc.get_objects() if type(each) is ControlLink]
    return [each for each in found if not each.channel.is_closed]


def break_control_channels():
    """What a stage's death looks like from outside: its connections end without a close."""
    for link in control_links():
        if link.channel.peer.role == ORCHESTRATOR:
            link.channel._wire.close()


PINS = {"0": "ab" * 48}


@pytest.mark.parametrize(
    "pins", [{}, {"3": "00" * 48}, {"1": "ab" * 48}, {"0": "00" * 48}, {**PINS, "4": "00" * 48}]
)
def test_pins_that_pin_nothing_are_refused(rig, tmp_path, pins):
    key = create_identity(tmp_path / "key.pem")
    assert len(key) == 64
    stages = tuple(
        stage.model_copy(update={"expected_measurements": {int(k): v for k, v in pins.items()}})
        for stage in rig.manifest.stages
    )
    manifest = rig.manifest.model_copy(update={"stages": stages})
    with pytest.raises(PolicyError, match="PCR 0"):
        UserTrust.create(manifest, tmp_path / "key.pem")


def test_a_key_file_open_to_others_is_refused(tmp_path):
    path = tmp_path / "key.pem"
    create_identity(path)
    load_identity(path)
    path.chmod(0o644)
    with pytest.raises(PolicyError, match="chmod 600"):
        load_identity(path)


def test_a_key_file_that_others_could_swap_is_neither_used_nor_made(tmp_path):
    path = tmp_path / "key.pem"
    create_identity(path)
    tmp_path.chmod(0o770)
    with pytest.raises(PolicyError, match="chmod go-w"):
        load_identity(path)
    with pytest.raises(PolicyError, match="chmod go-w"):
        create_identity(tmp_path / "new.pem")
    assert not (tmp_path / "new.pem").exists()


def test_a_key_file_behind_a_link_is_refused_and_none_is_written_through_one(tmp_path):
    path, link = tmp_path / "key.pem", tmp_path / "link.pem"
    link.symlink_to(path)
    with pytest.raises(InputError, match="exists"):
        create_identity(link)
    create_identity(path)
    with pytest.raises(PolicyError, match="symbolic link"):
        load_identity(link)
