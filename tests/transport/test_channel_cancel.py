"""Cancellation at any point leaves a channel as it was, or closed for good."""

from contextlib import contextmanager

import pytest
import trio
import trio.testing

from transport.channel import accept_channel, connect_channel
from transport.errors import ConnectionLost, ProtocolError
from transport.nonblocking_socket import FAIR_CALLS


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
    await toy.close(near, far)


async def test_waiting_for_a_frame_can_be_given_up_and_taken_up_again(toy):
    near, far = await toy.channels()
    with trio.move_on_after(0.01) as scope:
        await far.receive()
    assert scope.cancelled_caught
    assert not far.is_closed
    await near.send(toy.frame(5))
    assert (await far.receive()).header == b"header"
    await toy.close(near, far)


async def test_cancelled_before_anything_is_sealed_the_channel_is_as_it_was(toy):
    near, far = await toy.channels()
    with trio.CancelScope() as scope:
        scope.cancel()
        await near.send(toy.frame(5))
    assert scope.cancelled_caught
    await near.send(toy.frame(7))
    assert (await far.receive()).tensors[0].spec.shape == (7,)
    await toy.close(near, far)


async def test_cancelled_inside_a_frame_sender_and_receiver_are_closed(toy):
    near, far = await toy.channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.send, toy.frame(60_000_000))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
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
    from transport import nonblocking_socket

    calls = 0
    send, receive = nonblocking_socket.Wire.try_send, nonblocking_socket.Wire.try_receive

    def try_send(self, data):
        nonlocal calls
        calls += 1
        return 0 if calls % 2 else send(self, data[: max(1000, len(data) // 2)])

    def try_receive(self, into):
        nonlocal calls
        calls += 1
        return 0 if calls % 2 else receive(self, into[: max(1000, len(into) // 2)])

    with monkeypatch.context() as patch:
        patch.setattr(nonblocking_socket, "FAIR_CALLS", 1)
        patch.setattr(nonblocking_socket.Wire, "try_send", try_send)
        patch.setattr(nonblocking_socket.Wire, "try_receive", try_receive)
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


@pytest.mark.parametrize("size", [3000, 100_000])
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
