import json
import os
import socket
import tracemalloc
from contextlib import ExitStack, suppress

import pytest
import trio
import trio.testing

from transport import relay as relay_module
from transport.endpoint import TcpEndpoint, UnixEndpoint, dial, listen
from transport.errors import EndpointError
from transport.relay import Relay, RelayMap
from transport.relay_cli import metrics, write_metrics

LOOPBACK = TcpEndpoint("127.0.0.1", 0)
PAYLOAD = os.urandom(3 * relay_module.BUFFER_BYTES + 7)


async def receive(sock, num_bytes=None):
    """So many bytes, or everything up to the end of the stream."""
    data = bytearray()
    while num_bytes is None or len(data) < num_bytes:
        await trio.lowlevel.wait_readable(sock)
        chunk = sock.recv(1 << 16)
        if not chunk:
            break
        data += chunk
    return bytes(data)


async def send(sock, data):
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def until(condition):
    with trio.fail_after(15):
        while not condition():  # noqa: ASYNC110  (the relay has no event to wait for)
            await trio.sleep(0.002)


async def converse(near, far):
    """One byte each way: a connection that its target keeps."""
    near.send(b"?")
    assert await receive(far, 1) == b"?"
    far.send(b"!")
    assert await receive(near, 1) == b"!"


class Running:
    """A relay of one map with the ends of connections through it."""

    def __init__(self, nursery, listening, target, max_connections):
        self.target = listen(target)
        carried_to = self.target.endpoint
        self.relay = Relay([RelayMap(listening, carried_to, max_connections)])
        (self.stats,) = self.relay.stats.values()
        (listener,) = self.relay.listeners.values()
        self.endpoint = listener.endpoint
        nursery.start_soon(self.relay.run)

    async def connect(self):
        near = await dial(self.endpoint)
        return near, await self.target.accept()


@pytest.fixture
def running(nursery):
    started = []

    def start(listening=LOOPBACK, target=LOOPBACK, max_connections=8):
        started.append(Running(nursery, listening, target, max_connections))
        return started[-1]

    yield start
    for each in started:
        each.target.close()
        each.relay.close()


@pytest.mark.parametrize(
    ("listening", "target"),
    [
        (LOOPBACK, LOOPBACK),
        (TcpEndpoint("::1", 0), UnixEndpoint("t.sock")),
        (UnixEndpoint("l.sock"), LOOPBACK),
    ],
)
async def test_bytes_pass_unchanged_both_ways(running, listening, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relayed = running(listening, target)
    near, far = await relayed.connect()
    with near, far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, near, PAYLOAD)
            nursery.start_soon(send, far, PAYLOAD[::-1])
            assert await receive(far, len(PAYLOAD)) == PAYLOAD
            assert await receive(near, len(PAYLOAD)) == PAYLOAD[::-1]
    assert relayed.stats.bytes_to_target == relayed.stats.bytes_from_target == len(PAYLOAD)


@pytest.mark.parametrize("is_near_first", [True, False])
async def test_one_direction_ends_while_the_other_goes_on(running, is_near_first):
    relayed = running()
    ends = await relayed.connect()
    first, second = ends if is_near_first else ends[::-1]
    with first, second:
        first.send(b"question")
        first.shutdown(socket.SHUT_WR)
        assert await receive(second) == b"question"
        second.send(b"answer after the end")
        second.shutdown(socket.SHUT_WR)
        assert await receive(first) == b"answer after the end"
        await until(lambda: relayed.stats.active == 0)


async def test_reset_of_one_end_closes_the_other(running):
    relayed = running()
    near, far = await relayed.connect()
    with far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        near.close()  # with lingering off: a reset
        assert await receive(far) == b""
        await until(lambda: relayed.stats.active == 0)


async def test_peer_that_does_not_read_stops_the_sender(running):
    relayed = running()
    near, far = await relayed.connect()
    with near, far:
        for sock in (near, far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        sent = 0
        chunk = bytes(1 << 16)
        stalled = 0
        while stalled < 20:
            try:
                sent += near.send(chunk)
                stalled = 0
            except BlockingIOError:
                stalled += 1
                await trio.sleep(0.01)
            assert sent < 64 << 20, "the relay swallows without end"
        # What is on its way sits in kernel buffers; the relay itself holds one buffer at most.
        assert relayed.stats.bytes_to_target <= sent
        near.shutdown(socket.SHUT_WR)
        assert len(await receive(far)) == sent


async def test_relay_memory_does_not_grow_behind_a_peer_that_does_not_read(running):
    relayed = running()
    payload = bytes(128 << 20)
    tracemalloc.start()
    near, far = await relayed.connect()
    with near, far:
        try:
            with trio.move_on_after(0.5):
                await send(near, payload)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # One buffer a direction, and the bookkeeping around them.
    assert 2 * relay_module.BUFFER_BYTES < peak < 3 * relay_module.BUFFER_BYTES


async def test_busy_connection_does_not_starve_a_quiet_one(running):
    relayed = running()
    busy_near, busy_far = await relayed.connect()
    near, far = await relayed.connect()
    with busy_near, busy_far, near, far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, busy_near, bytes(64 << 20))
            nursery.start_soon(receive, busy_far)
            with trio.fail_after(15):
                for _ in range(20):
                    near.send(b"x")
                    assert await receive(far, 1) == b"x"
            nursery.cancel_scope.cancel()


async def test_connection_over_the_limit_is_closed_and_a_freed_place_taken(running, caplog):
    relayed = running(max_connections=1)
    near, far = await relayed.connect()
    await converse(near, far)
    with await dial(relayed.endpoint) as refused:
        assert await receive(refused) == b""
    assert relayed.stats.refused_over_limit == 1
    assert "refused map=" in caplog.text
    near.close()
    far.close()
    await until(lambda: relayed.stats.active == 0)
    near, far = await relayed.connect()
    near.close()
    far.close()
    assert relayed.stats.accepted == 2


@pytest.mark.parametrize("said", [b"", b"x"])
async def test_a_crowd_without_an_answer_makes_room_for_whoever_comes(running, said):
    relayed = running(max_connections=4)
    kept_near, kept_far = await relayed.connect()
    with ExitStack() as sockets:
        sockets.enter_context(kept_near)
        sockets.enter_context(kept_far)
        await converse(kept_near, kept_far)
        for _ in range(12):
            sockets.enter_context(await dial(relayed.endpoint)).send(said)
        near = sockets.enter_context(await dial(relayed.endpoint))
        near.send(b"right")

        async def answer(far):
            with suppress(ConnectionResetError):
                if await receive(far, 5) == b"right":
                    far.send(b"!")

        async def answer_all():
            while True:
                far = sockets.enter_context(await relayed.target.accept())
                nursery.start_soon(answer, far)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_all)
            with trio.fail_after(5):
                assert await receive(near, 1) == b"!"
            nursery.cancel_scope.cancel()
        await converse(kept_near, kept_far)
        assert relayed.stats.active <= 4
        assert relayed.stats.crowded_out >= 9
        assert relayed.stats.refused_over_limit == 0


async def test_a_connection_on_which_nobody_speaks_is_cut(running, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(relay_module, "SILENT_DEADLINE_S", 0.05)
    relayed = running()
    near, far = await relayed.connect()
    with near, far, trio.fail_after(5):
        assert await receive(near) == b""
        assert await receive(far) == b""
        await until(lambda: relayed.stats.active == 0)
    assert "reason=silent" in caplog.text


@pytest.mark.parametrize("is_dialer_first", [True, False])
async def test_a_connection_that_has_spoken_may_be_silent_for_as_long_as_it_likes(
    running, monkeypatch, is_dialer_first
):
    monkeypatch.setattr(relay_module, "SILENT_DEADLINE_S", 0.05)
    monkeypatch.setattr(relay_module, "ORPHANED_DEADLINE_S", 0.05)
    relayed = running()
    near, far = await relayed.connect()
    first, second = (near, far) if is_dialer_first else (far, near)
    with near, far:
        first.send(b"?")
        assert await receive(second, 1) == b"?"
        await trio.sleep(0.2)
        second.send(b"!")
        assert await receive(first, 1) == b"!"
        await trio.sleep(0.2)
        near.shutdown(socket.SHUT_WR)  # a caller who has said all may still wait for the answer
        assert await receive(far) == b""
        await trio.sleep(0.2)
        far.send(b"late")
        assert await receive(near, 4) == b"late"


async def test_a_caller_who_stays_after_the_target_has_ended_is_cut(running, monkeypatch):
    monkeypatch.setattr(relay_module, "ORPHANED_DEADLINE_S", 0.1)
    relayed = running()
    near, far = await relayed.connect()
    with near, far, trio.fail_after(5):
        await converse(near, far)
        far.shutdown(socket.SHUT_WR)
        assert await receive(near) == b""
        for _ in range(5):  # what the caller still has to say may follow
            await trio.sleep(0.05)
            near.send(b"x")
            assert await receive(far, 1) == b"x"
        assert await receive(far) == b""
        await until(lambda: relayed.stats.active == 0)


def test_a_peer_that_vanished_is_noticed_within_minutes():
    with socket.socket() as sock:
        relay_module._keep_alive(LOOPBACK, sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        idle, interval, count = (
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in options
        )
        assert idle + interval * count <= 180


async def test_unreachable_target_closes_the_caller_with_one_line(running, caplog):
    relayed = running()
    relayed.target.close()
    with await dial(relayed.endpoint) as near:
        assert await receive(near) == b""
    assert relayed.stats.failed_dials == 1
    assert relayed.stats.active == 0
    assert caplog.text.count("\n") == 1
    assert "start the listener first" in caplog.text


async def test_target_that_never_answers_is_given_up(running, monkeypatch, caplog):
    async def never(_):
        await trio.sleep_forever()

    monkeypatch.setattr(relay_module, "dial", never)
    monkeypatch.setattr(relay_module, "DIAL_DEADLINE_S", 0.05)
    relayed = running()
    with await dial(relayed.endpoint) as near:
        assert await receive(near) == b""
    assert "no answer" in caplog.text


async def test_connection_is_logged_once_with_its_counts_and_without_its_bytes(running, caplog):
    caplog.set_level("INFO")
    relayed = running()
    near, far = await relayed.connect()
    with near, far:
        near.send(b"confidential")
        assert await receive(far, 12) == b"confidential"
        far.send(b"reply")
        assert await receive(near, 5) == b"reply"
    await until(lambda: "carried map=" in caplog.text)
    assert caplog.text.count("\n") == 1
    assert "reason=closed" in caplog.text
    assert "bytes_to_target=12 bytes_from_target=5" in caplog.text
    assert "confidential" not in caplog.text


async def test_cancelled_relay_closes_every_socket(running):
    async with trio.open_nursery() as nursery:
        relayed = Running(nursery, LOOPBACK, LOOPBACK, 8)
        near, far = await relayed.connect()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with near, far:
        assert near.recv(1) == b""
        assert far.recv(1) == b""
    assert relayed.stats.active == 0
    with pytest.raises(EndpointError, match="refused"):
        await dial(relayed.endpoint)
    relayed.target.close()


async def test_relay_reaches_a_guest_over_bridged_vsock(running, nursery, tmp_path):
    bridge = listen(UnixEndpoint(tmp_path / "v.sock"))
    relay = Relay([RelayMap(LOOPBACK, UnixEndpoint(tmp_path / "v.sock", 5000))])
    nursery.start_soon(relay.run)
    (listener,) = relay.listeners.values()
    with bridge, await dial(listener.endpoint) as near, await bridge.accept() as guest:
        near.send(b"early")  # before the bridge has answered
        assert await receive(guest, 13) == b"CONNECT 5000\n"
        guest.send(b"OK 1\nlate")
        assert await receive(guest, 5) == b"early"
        assert await receive(near, 4) == b"late"
    relay.close()
    nursery.cancel_scope.cancel()


async def test_guest_reaches_the_network_over_bridged_vsock(running, tmp_path):
    relayed = running(UnixEndpoint(tmp_path / "v.sock", 9001))
    guest = await dial(UnixEndpoint(tmp_path / "v.sock_9001"))
    with guest, await relayed.target.accept() as far:
        guest.send(b"out")
        assert await receive(far, 3) == b"out"


async def test_map_that_cannot_listen_leaves_none_listening(tmp_path):
    with listen(LOOPBACK) as taken:
        maps = [
            RelayMap(UnixEndpoint(tmp_path / "a.sock"), LOOPBACK),
            RelayMap(taken.endpoint, LOOPBACK),
        ]
        with pytest.raises(EndpointError, match="in use"):
            Relay(maps)
    assert list(tmp_path.iterdir()) == []


async def test_metrics_show_every_map_and_replace_the_file_whole(running, tmp_path):
    relayed = running()
    near, far = await relayed.connect()
    with near, far:
        near.send(b"12345")
        await receive(far, 5)
        path = tmp_path / "metrics.json"
        path.write_text("old")
        write_metrics(relayed.relay, path)
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.json"]
    (shown,) = json.loads(path.read_text())["maps"]
    assert shown["listen"] == str(relayed.endpoint)
    assert shown["target"] == str(relayed.target.endpoint)
    assert (shown["accepted"], shown["active"], shown["bytes_to_target"]) == (1, 1, 5)
    assert metrics(relayed.relay)["maps"][0]["failed_dials"] == 0
