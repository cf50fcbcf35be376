"""Waiting in place, looking at a frame before it is taken, and frames that are laid out once."""

import socket
import time

import pytest
import trio
import trio.testing

from transport.errors import ConnectionLost, RecordError
from transport.nonblocking_socket import FAIR_NS
from transport.rekey_policy import RekeyPolicy
from transport.tensor_frames import FrameForm, encode_frame

BOTH_WAYS = pytest.mark.usefixtures("records_by")


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
    await toy.close(near, far)


async def test_waiting_in_place_for_what_does_not_come_ends_in_the_event_loop(toy):
    near, far = await toy.channels()
    far.wait_in_place(10)
    with trio.move_on_after(0.05) as patience:
        await far.receive()
    assert patience.cancelled_caught
    frame = toy.frame(10, 1)
    await near.send(frame)  # and nothing is lost by that
    assert toy.contents(await far.receive()) == toy.contents(frame)
    await toy.close(near, far)


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
    await toy.close(near, far)


@BOTH_WAYS
async def test_waiting_in_place_can_be_ended(toy):
    near, far = await toy.channels()
    for patience_ms in (10_000, 0):
        far.wait_in_place(patience_ms)
    started = trio.current_time()
    assert await far.peek() is None
    assert trio.current_time() - started < 5
    await toy.close(near, far)


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
    await toy.close(near, far)


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
    await toy.close(near, far)


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
    await toy.close(near, far)
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
    await toy.close(near, far)


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
    await toy.close(near, far)


@BOTH_WAYS
async def test_waiting_for_a_frame_to_look_at_lets_others_run(toy):
    near, far = await toy.channels()
    frame, shown = toy.frame(10, 1), []

    async def look():
        await far.wait_readable()
        shown.append(bytes(await far.peek()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await far.wait_readable()
        await near.send(frame)
    assert shown == [encode_frame(frame)[0]]
    await far.wait_readable()  # it is still there
    assert toy.contents(await far.receive()) == toy.contents(frame)
    with trio.move_on_after(0.01) as patience:
        await far.wait_readable()
    assert patience.cancelled_caught
    await near.send(frame)  # and nothing is lost by that
    assert toy.contents(await far.receive()) == toy.contents(frame)
    await toy.close(near, far)
