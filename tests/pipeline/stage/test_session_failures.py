"""Sessions that break, stall or end cost no more than themselves."""

import gc
import socket
import weakref
from contextlib import suppress
from itertools import count

import pytest
import trio
import trio.testing

import pipeline.stage.data_channels
import pipeline.stage.session
import pipeline.stage.worker
from pipeline.agreement.addresses import StageEndpoint, TcpAddress
from pipeline.agreement.trust_policy import DevTrust
from pipeline.engine.limits import Limits
from pipeline.errors import SessionError
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import (
    ControlLink,
    send_step,
)
from pipeline.protocol.messages import Failure, Health, Healthy, Shutdown, Waiting
from pipeline.protocol.peer_connections import ORCHESTRATOR
from tests.pipeline.stage.rig import LOOPBACK, failure_of, hidden, settled, step
from transport.errors import TransportError


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


async def test_an_orchestrator_may_take_its_time_before_init(rig, mock_clock, passing_time):
    async with rig.worker(init_seconds=3.0, idle_seconds=3.0):
        control = await rig.control()
        for sequence in range(4):
            await trio.sleep(1.0)
            await control.send(Health(sequence=sequence))
            assert (await control.receive()).sequence == sequence
        await control.aclose()
        async with rig.session():
            pass


async def test_one_that_only_asks_how_the_stage_is_keeps_nobody_out_for_long(
    rig, mock_clock, passing_time, monkeypatch
):
    monkeypatch.setattr(pipeline.stage.worker, "BUSY_SECONDS", 0.1)

    async def ask_for_ever(control):
        with suppress(TransportError):
            for sequence in count():
                await control.send(Health(sequence=sequence))
                await trio.sleep(0.05)

    async with rig.worker(init_seconds=3.0):
        first = await rig.control()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_for_ever, first)  # until the stage has hung up on it
            rig.trust = DevTrust.create(rig.directory / "dev")  # another orchestrator's key
            second = await rig.control()
            assert (await failure_of(second)).code == "busy"
            await trio.sleep(3.0)
            async with rig.session():
                pass
        for control in (first, second):
            await control.aclose()


async def test_a_stage_names_what_a_step_carries_in_words(rig):
    async with rig.worker(), rig.session() as (control, upstream):
        await send_step(upstream, step(Segment(0, 0, 2)), (hidden(3),))
        detail = (await failure_of(control)).detail
    assert "carries F32[3, 64], expected F32[2, 64]" in detail


async def test_a_refusal_reaches_an_orchestrator_that_is_still_talking(
    rig, mock_clock, passing_time, monkeypatch
):
    monkeypatch.setattr(pipeline.stage.worker, "BUSY_SECONDS", 0.1)
    async with rig.worker(), rig.session():
        second = await rig.control()
        for sequence in range(20):  # the last ones come after the refusal
            await second.send(Health(sequence=sequence))
            await trio.sleep(0.02)
        assert (await failure_of(second)).code == "busy"
        await second.aclose()


async def test_an_orchestrator_that_never_reads_is_silent_too(rig, mock_clock, passing_time):
    async with rig.worker(idle_seconds=2.0):
        async with rig.session() as (control, _):
            for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # full the sooner
                control.channel._wire._sock.setsockopt(socket.SOL_SOCKET, buffer, 1)
            with trio.move_on_after(4):
                for sequence in range(1_000_000):
                    await control.send(Health(sequence=sequence))
        with trio.fail_after(60):
            async with rig.session():
                pass


async def test_a_stage_says_what_it_waits_for(rig, monkeypatch):
    monkeypatch.setattr(pipeline.stage.data_channels, "WAITING_SECONDS", 0.05)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and nobody listens there
        port = sock.getsockname()[1]
        async with rig.worker():
            control = await rig.control()
            await control.send(rig.init(f"127.0.0.1:{port}"))
            with trio.fail_after(60):
                message = await control.receive()
            assert isinstance(message, Waiting)
            assert str(port) in message.detail
            await control.aclose()


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
            assert len(caches) == 3
            with trio.fail_after(60):
                while any(cache() is not None for cache in caches[:2]):
                    await trio.testing.wait_all_tasks_blocked(0.01)
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
        options = PipelineOptions(Limits(1, 64), data_out_listen=LOOPBACK)

        async def expect_loss():
            with pytest.raises(SessionError, match="stage 1 is lost"):
                async with open_pipeline(manifest, rig.trust, options, lambda line: None):
                    raise AssertionError("stage 0 does not exist")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_loss)
            with trio.fail_after(60):
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


async def test_a_worker_told_to_stop_says_so_once_its_step_is_on_its_way(rig):
    async with rig.worker(), rig.session() as (control, upstream):
        await send_step(upstream, step(Segment(0, 0, 5)), (hidden(5),))
        await settled(control, num_steps=1)
        with trio.fail_after(60):
            await rig.server.leave()
        assert (await failure_of(control)).code == "leaving"


async def test_a_worker_that_serves_nobody_stops_at_once(rig):
    async with rig.worker():
        with trio.fail_after(60):
            await rig.server.leave()


async def test_an_orchestrator_whose_connection_was_lost_need_not_wait_for_its_own_silence(
    rig, mock_clock, passing_time, monkeypatch
):
    monkeypatch.setattr(pipeline.stage.worker, "BUSY_SECONDS", 0.1)
    monkeypatch.setattr(pipeline.stage.worker, "STALE_SECONDS", 2.0)
    async with rig.worker(), rig.session():
        for is_silent in (False, True):
            await trio.sleep(2.1 if is_silent else 0)
            again = await rig.control()
            await again.send(Health(sequence=1))
            with trio.fail_after(60):
                answer = await again.receive()
            await again.aclose()
            assert isinstance(answer, Healthy if is_silent else Failure)


async def test_another_orchestrator_has_to_wait_for_one_that_is_silent(
    rig, mock_clock, passing_time, monkeypatch, tmp_path
):
    monkeypatch.setattr(pipeline.stage.worker, "BUSY_SECONDS", 0.1)
    monkeypatch.setattr(pipeline.stage.worker, "STALE_SECONDS", 0.0)
    async with rig.worker(), rig.session():
        rig.trust = DevTrust.create(rig.directory / "dev")
        other = await rig.control()
        assert (await failure_of(other)).code == "busy"
        await other.aclose()
