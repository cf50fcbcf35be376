"""What a relay carries, and what it says of it."""

import json
import os
import socket
import tracemalloc

import pytest
import trio
import trio.testing

from tests.transport.relayed import LOOPBACK, Running, receive, until
from transport import relay as relay_module
from transport.dial_and_listen import TcpEndpoint, UnixEndpoint, dial, listen
from transport.errors import EndpointError
from transport.relay import Relay, RelayMap
from transport.relay_cli import metrics, write_metrics

PAYLOAD = os.urandom(3 * relay_module.BUFFER_BYTES + 7)


async def send(sock, data):
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


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


async def test_relay_memory_does_not_grow_behind_a_peer_that_does_not_read(
    running, mock_clock, passing_time
):
    relayed = running()
    payload = bytes(128 << 20)
    tracemalloc.start()
    near, far = await relayed.connect()
    with near, far:
        try:
            with trio.move_on_after(2):
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
            with trio.fail_after(60):
                for _ in range(20):
                    near.send(b"x")
                    assert await receive(far, 1) == b"x"
            nursery.cancel_scope.cancel()


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
