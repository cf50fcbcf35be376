"""The channel under trio: frames arrive whole and in order, and ends are told apart."""

import socket

import pytest
import trio
import trio.testing

from transport import handshake
from transport.channel import accept_channel, connect_channel
from transport.errors import (
    ConnectionLost,
    FrameError,
    HandshakeError,
    MisuseError,
    NoAnswer,
)
from transport.rekey_policy import RekeyPolicy
from transport.tensor_frames import FrameLimits

UNIX_OR_TCP = pytest.mark.parametrize(
    "make_sockets", [socket.socketpair, None], ids=["unix", "tcp"]
)


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
    await toy.close(near, far)


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
    await toy.close(near, far)


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
    await toy.close(near, far)


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
    await toy.close(near, far)


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
    await toy.close(near, far)


async def test_a_frame_that_cannot_travel_leaves_the_channel_usable(toy):
    near, far = await toy.channels()
    with pytest.raises(MisuseError):
        await near.send(toy.frame(header=bytes(1 << 20)))
    await near.send(toy.frame(5))
    assert (await far.receive()).tensors[0].spec.shape == (5,)
    await toy.close(near, far)


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
        with trio.fail_after(60), pytest.raises(trio.EndOfChannel):
            await far.receive()
    near._wire.close()
    await far.aclose()


async def test_a_small_frame_takes_one_system_call_at_either_end(toy, monkeypatch):
    from transport import nonblocking_socket

    near, far = await toy.channels()
    calls = []
    for name in ("try_send", "try_receive"):
        real = getattr(nonblocking_socket.Wire, name)
        monkeypatch.setattr(
            nonblocking_socket.Wire,
            name,
            lambda *a, name=name, real=real: (calls.append(name), real(*a))[1],
        )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.receive)
        await trio.testing.wait_all_tasks_blocked()
        await near.send(toy.frame(3072))
    assert calls == ["try_send", "try_receive"]
    await toy.close(near, far)


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
        with pytest.raises(HandshakeError, match="does not speak veilpipe/2"):
            await function(near, toy.link(), toy.credentials(), toy.LIMITS)
        assert near.fileno() < 0
        far.close()


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 10])
async def test_a_peer_that_leaves_during_the_handshake_is_a_lost_connection(toy, num_bytes):
    for function in (connect_channel, accept_channel):
        near, far = toy.tcp_pair()
        far.send(b"\0\x30abcdefghijkl"[:num_bytes] if function is accept_channel else b"")
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


async def test_the_initiator_learns_that_its_link_is_refused_and_not_that_nobody_is_up(toy):
    near, far = toy.tcp_pair()
    refusals = []

    async def accept():
        with pytest.raises(HandshakeError, match="for another link") as caught:
            await accept_channel(far, toy.link(), toy.credentials(), toy.LIMITS)
        refusals.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        with pytest.raises(HandshakeError, match=r"refuses our .*another manifest"):
            await connect_channel(near, toy.link(epoch=bytes(16)), toy.credentials(), toy.LIMITS)
    assert len(refusals) == 1


async def test_a_hello_is_shown_before_anything_is_proved_and_may_be_refused(toy):
    seen = []

    class Attester(toy.Attester):
        def attest(self, binding):
            pytest.fail("evidence for a hello that was refused")

    def refuse(ephemeral_key):
        seen.append(ephemeral_key)
        raise HandshakeError("heard before")

    near, far = toy.tcp_pair()
    _, hello = handshake.initiate(toy.link(), toy.credentials())
    near.send(handshake.with_length(hello))
    credentials = toy.credentials(attester=Attester())
    with pytest.raises(HandshakeError, match="heard before"):
        await accept_channel(far, toy.link(), credentials, toy.LIMITS, on_hello=refuse)
    assert seen == [hello[:32]]
    assert near.recv(3) == handshake.REFUSAL
    near.close()


async def test_a_failed_handshake_closes_both_sockets(toy):
    near, far = toy.tcp_pair()
    with pytest.RaisesGroup(HandshakeError):
        await toy.channels((near, far), peer_link=toy.link(epoch=bytes(16)))
    assert near.fileno() < 0
    assert far.fileno() < 0
