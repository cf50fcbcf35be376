"""Stages against orchestrators and neighbours that are authentic and misbehave."""

import socket

import pytest
import trio

from pipeline.agreement.identity import create_identity
from pipeline.agreement.trust_policy import UserTrust
from pipeline.errors import PolicyError
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import (
    send_step,
)
from pipeline.protocol.messages import (
    Abort,
    Broken,
    Done,
    Failure,
    Healthy,
    StageFigures,
    Start,
)
from pipeline.protocol.step_header import PROTOCOL_VERSION, StepKind
from pipeline.protocol.step_limits import CLEAR_SENTINEL
from tests.pipeline.stage.rig import failure_of, figures_of, hidden, settled, step

NOTHING = StageFigures(**dict.fromkeys(StageFigures.model_fields, 0))


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
    ("header", "tensor", "answer"),
    [
        (step(Segment(2, 0, 1)), hidden(1), Broken),  # a slot that there is not
        (step(Segment(0, 0, 2)), hidden(1), Broken),
        (step(Segment(0, 5, 1)), hidden(1), Failure),  # behind what the slot holds
    ],
)
async def test_what_a_step_declares_breaks_its_channel_and_what_it_holds_the_session(
    rig, header, tensor, answer
):
    async with rig.worker(), rig.session() as (control, upstream):
        await send_step(upstream, header, (tensor,))
        assert type(await failure_of(control)) is answer


async def test_the_end_of_a_request_that_never_began_is_ignored(rig):
    async with rig.worker(), rig.session() as (control, _):
        await control.send(Done(request_id=7))
        await control.send(Abort(request_id=7))
        assert (await figures_of(control)).num_slots == 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_step_tokens": 1 << 20}, "1048576"),
        ({"max_seq_len": 1 << 20}, "1048576"),
        ({"stage_idx": 0}, "init is for"),
        ({"hidden_dim": 32}, "init is for"),
        ({"version": 1}, "version 1"),
        ({"version": PROTOCOL_VERSION - 1}, f"not {PROTOCOL_VERSION}"),
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

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and nobody listens there
        port = sock.getsockname()[1]
        async with rig.worker():
            control = await rig.control()
            monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
            await control.send(rig.init(f"rebinding.example:{port}"))
            failure = await failure_of(control)
            await control.aclose()
    assert failure.code == "refused"
    assert "may not dial tcp:rebinding.example" in failure.detail
    assert len(looked_up) == 2


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
