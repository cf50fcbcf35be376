"""The channel under trio: frames arrive whole, ends are told apart, cancellation leaves nothing."""

import socket
import time
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from transport.channel import accept_channel, connect_channel
from transport.errors import (
    ConnectionLost,
    FrameError,
    HandshakeError,
    MisuseError,
    NoAnswer,
    ProtocolError,
    RecordError,
)
from transport.frames import FrameForm, FrameLimits, encode_frame
from transport.records import RekeyPolicy
from transport.wire import FAIR_CALLS, FAIR_NS

BOTH_WAYS = pytest.mark.usefixtures("records_by")
UNIX_OR_TCP = pytest.mark.parametrize(
    "make_sockets", [socket.socketpair, None], ids=["unix", "tcp"]
)


async def close_all(*channels):
    for channel in channels:
        await channel.aclose()


@UNIX_OR_TCP
async def test_frames_arrive_whole_and_in_order_until_the_close(toy, make_sockets):
    near, far = await toy.channels(make_sockets() if make_sockets else None)
    sent = [toy.frame(size, 4) for size in (0, 1, 3072, 70_000, 1_500_000, 3072, 5_000_000, 10)]

    async def send():
        async with near:
            for frame in sent:
                await near.send(frame)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        received = [toy.contents(frame) async for frame in far]
    assert received == [toy.contents(frame) for frame in sent]
    with pytest.raises(trio.EndOfChannel):
        await far.receive()
    await far.aclose()


async def test_peers_know_each_other(toy):
    near, far = await toy.channels()
    assert near.peer.role == toy.STAGE_1
    assert far.peer.role == toy.STAGE_0
    assert near.handshake_hash == far.handshake_hash
    await close_all(near, far)


async def test_rekey_is_crossed_three_times_per_direction_under_full_duplex(toy):
    near, far = await toy.channels(rekey=RekeyPolicy(max_records=5))
    num_frames = 12

    async def send(channel):
        for number in range(num_frames):
            await channel.send(
                toy.frame(700_000 if number % 3 == 0 else 3000, header=b"%d" % number)
            )

    async def receive(channel):
        for number in range(num_frames):
            assert (await channel.receive()).header == b"%d" % number

    async with trio.open_nursery() as nursery:
        for channel in (near, far):
            nursery.start_soon(send, channel)
            nursery.start_soon(receive, channel)
    for channel in (near, far):
        assert channel._sealer.num_rekeys >= 3
        assert channel._opener.num_rekeys >= 3
        assert channel.stats.rekeys == channel._sealer.num_rekeys + channel._opener.num_rekeys
    await close_all(near, far)


async def test_stats_count_bytes_frames_and_time(toy):
    near, far = await toy.channels()
    before = near.stats, far.stats
    await near.send(toy.frame(3072))
    await far.receive()
    sent, received = near.stats, far.stats
    assert sent.frames_sent - before[0].frames_sent == 1
    assert received.frames_received == 1
    num_bytes = sent.bytes_sent - before[0].bytes_sent
    assert num_bytes == received.bytes_received - before[1].bytes_received
    assert 3072 < num_bytes < 3072 + 100
    for ours, stats, name in (
        (before[0], sent, "encrypt_ns"),
        (before[0], sent, "send_ns"),
        (before[1], received, "decrypt_ns"),
        (before[1], received, "recv_ns"),
    ):
        assert 0 < getattr(stats, name) - getattr(ours, name) < 10**9
    await close_all(near, far)


async def test_a_tensor_is_a_view_that_the_next_receive_reuses(toy):
    near, far = await toy.channels()
    first, second = toy.frame(2_000_000), toy.frame(2_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.send, first)
        one = await far.receive()
        assert one.tensors[0].data == first.tensors[0].data
        nursery.start_soon(near.send, second)
        two = await far.receive()
    assert two.tensors[0].data.obj is one.tensors[0].data.obj
    await close_all(near, far)


async def test_two_tasks_may_not_send_or_receive_at_once(toy):
    near, far = await toy.channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.send, toy.frame(30_000_000))
        nursery.start_soon(near.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await near.send(toy.frame(1))
        with pytest.raises(trio.BusyResourceError):
            await near.receive()
        await far.receive()
        await far.send(toy.frame(1))
    await close_all(near, far)


async def test_a_frame_that_cannot_travel_leaves_the_channel_usable(toy):
    near, far = await toy.channels()
    with pytest.raises(MisuseError):
        await near.send(toy.frame(header=bytes(1 << 20)))
    await near.send(toy.frame(5))
    assert (await far.receive()).tensors[0].spec.shape == (5,)
    await close_all(near, far)


async def test_using_a_closed_channel_is_told_apart_from_its_end(toy):
    near, far = await toy.channels()
    await near.aclose()
    await near.aclose()
    for action in (lambda: near.send(toy.frame(1)), near.receive):
        with pytest.raises(trio.ClosedResourceError):
            await action()
    with pytest.raises(trio.EndOfChannel):
        await far.receive()
    await far.aclose()


async def test_the_end_stays_the_end_while_the_peer_holds_the_socket_open(toy):
    near, far = await toy.channels()
    near._wire.try_send(near._sender.close())
    for _ in range(2):
        with trio.fail_after(5), pytest.raises(trio.EndOfChannel):
            await far.receive()
    near._wire.close()
    await far.aclose()


async def test_a_small_frame_takes_one_system_call_at_either_end(toy, monkeypatch):
    from transport import wire

    near, far = await toy.channels()
    calls = []
    for name in ("try_send", "try_receive"):
        real = getattr(wire.Wire, name)
        monkeypatch.setattr(
            wire.Wire, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]
        )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.receive)
        await trio.testing.wait_all_tasks_blocked()
        await near.send(toy.frame(3072))
    assert calls == ["try_send", "try_receive"]
    await close_all(near, far)


async def test_closing_wakes_the_task_that_receives(toy):
    near, far = await toy.channels()

    async def receive():
        with pytest.raises(trio.ClosedResourceError):
            await near.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await near.aclose()
    await far.aclose()


async def test_closing_cuts_off_the_task_that_sends_and_the_peer_sees_a_loss(toy):
    near, far = await toy.channels()

    async def send():
        with pytest.raises(trio.ClosedResourceError):
            await near.send(toy.frame(60_000_000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        await near.aclose()
    with pytest.raises(ConnectionLost):
        await far.receive()
    assert far.is_closed


async def test_an_end_without_close_is_a_lost_connection(toy):
    near, far = await toy.channels()
    near._wire.close()
    with pytest.raises(ConnectionLost, match="without an authenticated close"):
        await far.receive()
    assert far.is_closed
    with pytest.raises(trio.ClosedResourceError):
        await far.receive()


async def test_sending_to_a_peer_that_is_gone_is_a_lost_connection(toy):
    near, far = await toy.channels()
    far._wire.close()

    async def send_on():
        while True:
            await near.send(toy.frame(100_000))

    with pytest.raises(ConnectionLost):
        await send_on()
    assert near.is_closed


async def test_a_frame_over_the_limits_closes_the_channel(toy):
    near, far = await toy.channels(limits=FrameLimits(100, 1, 1000))
    await near.send(toy.frame(1001))
    with pytest.raises(FrameError, match="1001 tensor bytes"):
        await far.receive()
    assert far.is_closed
    await near.aclose()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\xff" * 100])
async def test_a_peer_that_is_not_veilpipe_is_refused_by_both_roles(toy, garbage):
    for function in (connect_channel, accept_channel):
        near, far = toy.tcp_pair()
        far.send(garbage)
        with pytest.raises(HandshakeError, match="does not speak veilpipe/1"):
            await function(near, toy.link(), toy.credentials(), toy.LIMITS)
        assert near.fileno() < 0
        far.close()


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 10])
async def test_a_peer_that_leaves_during_the_handshake_is_a_lost_connection(toy, num_bytes):
    for function in (connect_channel, accept_channel):
        near, far = toy.tcp_pair()
        far.send(b"\0\x20abcdefghijkl"[:num_bytes] if function is accept_channel else b"")
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionLost, match="handshake"):
            await function(near, toy.link(), toy.credentials(), toy.LIMITS)
        assert near.fileno() < 0
        far.close()


async def test_only_a_peer_that_never_said_a_byte_gave_no_answer(toy):
    for said, is_silent in ((b"", True), (b"\0", False)):
        near, far = toy.tcp_pair()
        far.send(said)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionLost) as caught:
            await connect_channel(near, toy.link(), toy.credentials(), toy.LIMITS)
        assert isinstance(caught.value, NoAnswer) is is_silent
        far.close()


async def test_a_failed_handshake_closes_both_sockets(toy):
    near, far = toy.tcp_pair()
    with pytest.RaisesGroup(HandshakeError):
        await toy.channels((near, far), peer_link=toy.link(epoch=bytes(16)))
    assert near.fileno() < 0
    assert far.fileno() < 0


async def test_every_operation_can_be_cancelled_even_when_it_need_not_wait(toy):
    near, far = await toy.channels()
    for _ in range(3):
        await near.send(toy.frame(5))
    await far.receive()  # the other two are in the buffer from here on
    for operation in (far.receive, lambda: near.send(toy.frame(5)), near.aclose, near.aclose):
        with trio.CancelScope() as scope:
            scope.cancel()
            await operation()
        assert scope.cancelled_caught
    assert toy.contents(await far.receive())[1] == b"header"
    await far.aclose()


async def test_a_busy_channel_lets_other_tasks_run(toy):
    near, far = await toy.channels()
    num_turns = 0

    async def count_turns():
        nonlocal num_turns
        while True:
            await trio.lowlevel.checkpoint()
            num_turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        for _ in range(10 * FAIR_CALLS):
            await near.send(toy.frame(5))
        nursery.cancel_scope.cancel()
    assert num_turns >= 5
    await close_all(near, far)


async def test_waiting_for_a_frame_can_be_given_up_and_taken_up_again(toy):
    near, far = await toy.channels()
    with trio.move_on_after(0.01) as scope:
        await far.receive()
    assert scope.cancelled_caught
    assert not far.is_closed
    await near.send(toy.frame(5))
    assert (await far.receive()).header == b"header"
    await close_all(near, far)


async def test_cancelled_before_anything_is_sealed_the_channel_is_as_it_was(toy):
    near, far = await toy.channels()
    with trio.CancelScope() as scope:
        scope.cancel()
        await near.send(toy.frame(5))
    assert scope.cancelled_caught
    await near.send(toy.frame(7))
    assert (await far.receive()).tensors[0].spec.shape == (7,)
    await close_all(near, far)


async def test_cancelled_inside_a_frame_sender_and_receiver_are_closed(toy):
    near, far = await toy.channels()
    with trio.move_on_after(0.05):
        await near.send(toy.frame(60_000_000))
    assert near.is_closed
    with pytest.raises(ConnectionLost):
        await far.receive()
    near, far = await toy.channels()
    data, _ = near._sender.begin(toy.frame(3000))
    near._wire.try_send(data[:100])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.receive)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert far.is_closed
    near._wire.close()


class CancelAtCheckpoint(trio.abc.Instrument):
    """Cancel `scope` before the task's n-th step: at its n-th real suspension."""

    def __init__(self, scope, task, number):
        self.scope, self.task, self.left = scope, task, number

    def before_task_step(self, task):
        if task is self.task and not self.scope.cancel_called:
            if self.left == 0:
                self.scope.cancel()
            self.left -= 1


@contextmanager
def forced_checkpoints(monkeypatch):
    """Make every turn suspend, every second system call block, and the others do half."""
    from transport import wire

    calls = 0
    send, receive = wire.Wire.try_send, wire.Wire.try_receive

    def try_send(self, data):
        nonlocal calls
        calls += 1
        return 0 if calls % 2 else send(self, data[: max(1000, len(data) // 2)])

    def try_receive(self, into):
        nonlocal calls
        calls += 1
        return 0 if calls % 2 else receive(self, into[: max(1000, len(into) // 2)])

    with monkeypatch.context() as patch:
        patch.setattr(wire, "FAIR_CALLS", 1)
        patch.setattr(wire.Wire, "try_send", try_send)
        patch.setattr(wire.Wire, "try_receive", try_receive)
        yield


async def run_cancelled(number, operation):
    """Run `operation`, cancelled at its n-th suspension; returns whether it got that far."""
    async with trio.open_nursery() as nursery:

        async def run(task_status):
            with trio.CancelScope() as scope:
                instrument = CancelAtCheckpoint(scope, trio.lowlevel.current_task(), number)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await operation()
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            task_status.started(scope.cancelled_caught)

        return await nursery.start(run)


async def swallow(operation, *arguments):
    try:
        return await operation(*arguments)
    except (ProtocolError, ConnectionLost, trio.ClosedResourceError, trio.EndOfChannel):
        return None


@pytest.mark.parametrize("role", ["connect", "accept"])
async def test_a_handshake_cancelled_at_any_checkpoint_leaves_nothing(toy, monkeypatch, role):
    before = toy.open_sockets()
    for number in range(1000):
        near, far = toy.tcp_pair()
        ours, theirs = (connect_channel, accept_channel)
        if role == "accept":
            ours, theirs = theirs, ours
        made = []

        async def operation(near=near, ours=ours, made=made):
            made.append(await ours(near, toy.link(), toy.credentials(), toy.LIMITS))

        with forced_checkpoints(monkeypatch):
            async with trio.open_nursery() as nursery:

                async def peer(far=far, theirs=theirs):
                    channel = await swallow(theirs, far, toy.link(), toy.credentials(), toy.LIMITS)
                    if channel is not None:
                        await channel.aclose()

                nursery.start_soon(peer)
                was_cancelled = await run_cancelled(number, operation)
                if made:
                    await made[0].aclose()
        assert near.fileno() < 0
        assert toy.open_sockets() == before
        if not was_cancelled:
            break
    assert number > 6


@pytest.mark.parametrize("size", [3000, 330_000])
@pytest.mark.parametrize("name", ["send", "receive", "aclose"])
async def test_an_operation_cancelled_at_any_checkpoint_leaves_nothing_half_done(
    toy, monkeypatch, name, size
):
    before = toy.open_sockets()
    for number in range(1000):
        near, far = await toy.channels()
        frame = toy.frame(size)
        with forced_checkpoints(monkeypatch):
            async with trio.open_nursery() as nursery:
                operation = {
                    "send": lambda near=near, frame=frame: near.send(frame),
                    "receive": near.receive,
                    "aclose": near.aclose,
                }[name]
                if name == "receive":
                    nursery.start_soon(swallow, far.send, frame)
                else:
                    nursery.start_soon(swallow, far.receive)
                was_cancelled = await run_cancelled(number, operation)
                if was_cancelled and name != "aclose" and not near.is_closed:
                    # Only where nothing of a frame was under way; then all goes on as before.
                    assert near.stats.frames_sent == near.stats.frames_received == 0
                    assert near._sealer._cipher.nonce <= 1
                    if name == "receive":
                        assert toy.contents(await near.receive()) == toy.contents(frame)
                    else:
                        await near.send(frame)
                if name == "aclose":
                    assert near.is_closed
                nursery.cancel_scope.deadline = trio.current_time() + 1
        near._wire.close()
        far._wire.close()
        assert toy.open_sockets() == before
        if not was_cancelled:
            break
    assert number > (0 if name == "aclose" else 1)


async def test_one_that_waits_in_place_lets_others_run_now_and_then(toy):
    near, far = await toy.channels()
    far.wait_in_place(1000)
    num_turns = 0

    async def count_turns():
        nonlocal num_turns
        while True:
            num_turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        for _ in range(10):
            await near.send(toy.frame(10, 1))
            time.sleep(2 * FAIR_NS / 1e9)  # noqa: ASYNC251 - as one that computes
            await far.receive()
        nursery.cancel_scope.cancel()
    assert num_turns >= 5
    await close_all(near, far)


async def test_waiting_in_place_for_what_does_not_come_ends_in_the_event_loop(toy):
    near, far = await toy.channels()
    far.wait_in_place(10)
    with trio.move_on_after(0.05) as patience:
        await far.receive()
    assert patience.cancelled_caught
    frame = toy.frame(10, 1)
    await near.send(frame)  # and nothing is lost by that
    assert toy.contents(await far.receive()) == toy.contents(frame)
    await close_all(near, far)


async def test_waiting_in_place_ends_with_the_connection(toy):
    near, far = await toy.channels()
    far.wait_in_place(1000)
    await near.aclose()
    with pytest.raises(trio.EndOfChannel):
        await far.receive()
    await far.aclose()


@BOTH_WAYS
@pytest.mark.parametrize("name", ["receive", "peek"])
async def test_closing_one_that_waits_in_place_while_others_have_their_turn(toy, name, monkeypatch):
    near, far = await toy.channels()
    far.wait_in_place(1)
    number, others = far._wire.fd, []

    async def close():
        far._wire.close()
        others.extend(sock for _ in range(8) for sock in socket.socketpair())

    with monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel, "checkpoint", close)
        with pytest.raises(trio.ClosedResourceError):
            await getattr(far, name)()
    assert number in [sock.fileno() for sock in others]  # and that one is left alone
    far.wait_in_place(1)
    for sock in others:
        sock.close()
    await close_all(near, far)


@BOTH_WAYS
async def test_waiting_in_place_can_be_ended(toy):
    near, far = await toy.channels()
    for patience_ms in (10_000, 0):
        far.wait_in_place(patience_ms)
    started = trio.current_time()
    assert await far.peek() is None
    assert trio.current_time() - started < 5
    await close_all(near, far)


@BOTH_WAYS
async def test_a_frame_that_was_looked_at_is_still_the_next_until_it_is_dropped(toy):
    near, far = await toy.channels()
    far.wait_in_place(1000)
    frames = [toy.frame(size, 4) for size in (10, 3072, 70_000, 20)]
    for frame in frames[:2]:
        await near.send(frame)
    for frame in frames[:2]:
        shown = bytes(await far.peek())
        assert shown == encode_frame(frame)[0]
        assert await far.peek() == shown
        assert toy.contents(await far.receive()) == toy.contents(frame)
    for frame in frames[2:]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send, frame)
            await trio.testing.wait_all_tasks_blocked()
            assert await far.peek() is not None
            received = await far.receive()
        assert toy.contents(received) == toy.contents(frame)
    await near.send(frames[0])
    await near.send(frames[1])
    await far.peek()
    far.drop()
    assert toy.contents(await far.receive()) == toy.contents(frames[1])
    assert far.stats.frames_received == near.stats.frames_sent == 6
    await near.aclose()
    assert await far.peek() is None
    with pytest.raises(trio.EndOfChannel):
        await far.receive()
    await far.aclose()


@BOTH_WAYS
async def test_looking_for_a_frame_that_does_not_come_loses_nothing(toy):
    near, far = await toy.channels()
    assert await far.peek() is None  # in place it waits only where that has been asked for
    far.wait_in_place(1)
    assert await far.peek() is None
    frame = toy.frame(10, 4)
    await near.send(frame)
    assert toy.contents(await far.receive()) == toy.contents(frame)
    await close_all(near, far)


@BOTH_WAYS
@pytest.mark.parametrize("break_it", ["forge", "hang up"])
async def test_looking_at_what_is_not_authentic_ends_the_channel(toy, break_it):
    near, far = await toy.channels()
    far.wait_in_place(1000)
    if break_it == "forge":
        sealed = bytearray(near._sender.begin(toy.frame(10))[0])
        sealed[-1] ^= 1
        near._wire.try_send(memoryview(sealed))
    else:
        near._wire.close()
    with pytest.raises(RecordError if break_it == "forge" else ConnectionLost):
        await far.peek()
    with pytest.raises(trio.ClosedResourceError):
        await far.peek()
    await close_all(near, far)


@BOTH_WAYS
async def test_a_form_travels_as_the_frame_it_was_made_of_and_as_it_is_filled_in(toy):
    near, far = await toy.channels(rekey=RekeyPolicy(max_records=2))
    frame, other = toy.frame(10, 4), toy.frame(10, 4, header=b"HEADER")
    form = FrameForm(frame)
    for _ in range(5):
        await near.send_form(form)
        assert toy.contents(await far.receive()) == toy.contents(frame)
    form.plain[form.header_start : form.header_stop] = other.header
    for (start, stop), tensor in zip(form.places, other.tensors, strict=True):
        form.plain[start:stop] = tensor.data
    await near.send_form(form)
    assert toy.contents(await far.receive()) == toy.contents(other)
    assert near.stats.frames_sent == 6
    await close_all(near, far)
    with pytest.raises(trio.ClosedResourceError):
        await near.send_form(form)


@BOTH_WAYS
async def test_forms_wait_for_a_peer_that_does_not_read(toy):
    near, far = await toy.channels(socket.socketpair())
    frame = toy.frame(60_000)
    form, num_sent = FrameForm(frame), 0

    async def send():
        nonlocal num_sent
        for _ in range(40):
            await near.send_form(form)
            num_sent += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < num_sent < 40
        with pytest.raises(trio.BusyResourceError):
            await near.send_form(form)
        for _ in range(40):
            assert toy.contents(await far.receive()) == toy.contents(frame)
    await close_all(near, far)


@BOTH_WAYS
async def test_one_that_only_looks_lets_others_run_now_and_then(toy):
    near, far = await toy.channels()
    far.wait_in_place(1)
    with trio.move_on_after(0.05) as patience:
        while True:
            await far.peek()
    assert patience.cancelled_caught
    frame = toy.frame(10)
    await near.send(frame)
    assert toy.contents(await far.receive()) == toy.contents(frame)
    await close_all(near, far)
