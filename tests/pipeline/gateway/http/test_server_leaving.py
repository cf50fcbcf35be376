"""The gateway on raw sockets: clients that leave, stall, or do not read."""

import json
import socket
import struct
from pathlib import Path
from random import Random

import pytest
import trio

from tests.pipeline.gateway.http.raw_requests import CHAT, chat_body, wait_until


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_generation(
    start_gateway, connect, make_engine, stream
):
    async with start_gateway(make_engine(seconds=0.005, repeats=True)) as gateway:
        async with connect(gateway) as client:
            await client.post(CHAT, chat_body(stream=stream, n=2))
            await wait_until(lambda: gateway.engine.num_made >= 5)
        await wait_until(lambda: gateway.engine.num_active == 0)
        made = gateway.engine.num_made
        await trio.sleep(0.05)
        assert gateway.engine.num_made == made
        labels = {"route": CHAT, "status": "499"}
        assert gateway.metric("veilpipe_http_requests_total", **labels) == 1


async def test_a_half_closed_client_has_left(start_gateway, connect, make_engine):
    async with start_gateway(make_engine(seconds=0.005, repeats=True)) as gateway:
        async with connect(gateway) as client:
            await client.post(CHAT, chat_body(stream=True))
            await wait_until(lambda: gateway.engine.num_made >= 3)
            await client.stream.send_eof()
            with trio.fail_after(60):
                await client.wait_closed()
        assert gateway.engine.num_active == 0


async def test_a_client_that_reads_nothing_slows_no_other_and_is_cut_off(
    start_gateway, connect, make_engine
):
    engine = make_engine(text="x" * 100, repeats=True, max_seq_len=30_000)
    small = {(socket.SOL_SOCKET, socket.SO_RCVBUF): 4096}
    async with (
        start_gateway(engine, write_seconds=1.0) as gateway,
        connect(gateway, sockopts=small) as stuck,
        connect(gateway) as other,
    ):
        # So many events that no socket buffer holds them.
        await stuck.post(CHAT, chat_body(stream=True, logprobs=True, top_logprobs=20))
        await wait_until(lambda: engine.num_made > 100)
        for _ in range(3):
            with trio.fail_after(60):
                await other.post(CHAT, chat_body(max_tokens=5))
                status, _, _ = await other.read_response()
            assert status == 200
        # Nothing waits for what it does not read, neither its slot nor the server.
        await wait_until(lambda: not gateway.metric("veilpipe_http_active_requests"))
        assert engine.num_active == 0
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 1)


async def test_shutdown_does_not_wait_for_a_client_that_reads_nothing(
    start_gateway, connect, make_engine
):
    engine = make_engine(text="x" * 100, repeats=True, max_seq_len=30_000)
    with trio.fail_after(60):
        async with start_gateway(engine) as gateway:
            stream = await trio.open_tcp_stream("127.0.0.1", gateway.port)
            request = chat_body(stream=True, logprobs=True, top_logprobs=20)
            head = b"POST %s HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-test-0123456789\r\n"
            await stream.send_all(head % CHAT.encode())
            await stream.send_all(b"content-length: %d\r\n\r\n%s" % (len(request), request))
            await wait_until(lambda: engine.num_made > 1000)
    await stream.aclose()
    assert engine.num_active == 0


async def test_headers_that_never_end_are_cut_off(start_gateway, connect):
    async with start_gateway(header_seconds=1.0) as gateway, connect(gateway) as client:
        await client.stream.send_all(b"POST /v1/chat/completions HTTP/1.1\r\n")

        async def trickle():
            try:
                while True:
                    await client.stream.send_all(b"x-a: b\r\n")
                    await trio.sleep(0.05)
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            with trio.fail_after(60):
                await client.wait_closed()
            nursery.cancel_scope.cancel()


async def test_a_body_that_never_ends_is_cut_off(start_gateway, connect):
    async with start_gateway(body_seconds=0.2) as gateway, connect(gateway) as client:
        await client.post(CHAT, b'{"model"', length=1000)
        with trio.fail_after(60):
            status, _, body = await client.read_response()
            await client.wait_closed()
        assert status == 408
        assert json.loads(body)["error"]["code"] == "request_timeout"


async def test_an_idle_connection_is_closed(start_gateway, connect):
    async with start_gateway(header_seconds=1.0) as gateway, connect(gateway) as client:
        await client.post(CHAT, chat_body())
        assert (await client.read_response())[0] == 200
        with trio.fail_after(60):
            assert await client.wait_closed() == b""


async def test_a_connection_its_client_closed_is_given_up_at_once(start_gateway, connect):
    async with start_gateway(header_seconds=60) as gateway:
        async with connect(gateway):
            await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 1)
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_client_that_sent_its_next_request_and_left_is_noticed(
    start_gateway, connect, make_engine, stream, reset
):
    async with start_gateway(make_engine(seconds=0.005, repeats=True)) as gateway:
        async with connect(gateway) as client:
            await client.post(CHAT, chat_body(stream=stream))
            await wait_until(lambda: gateway.engine.num_made >= 3)
            await client.post(CHAT, chat_body())
            if reset:
                linger = struct.pack("ii", 1, 0)
                client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await wait_until(lambda: gateway.engine.num_active == 0)
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)
        assert len(gateway.engine.generations) == 1


async def test_clients_that_leave_anyhow_leave_nothing_behind(start_gateway, connect, make_engine):
    random = Random(5)
    request = chat_body(stream=True, n=2)
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" % (CHAT.encode(), len(request))
    key = b"authorization: Bearer sk-test-0123456789\r\n"
    whole = [
        head + key + b"\r\n" + request,
        head + b"\r\n" + request,
        b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + key + b"\r\n",
        b"nonsense\r\n\r\n",
    ]

    async def abuse(gateway):
        async with connect(gateway) as client:
            data = b"".join(random.choices(whole, k=random.randrange(1, 5)))
            if random.random() < 0.5:
                data = data[: random.randrange(len(data))]
            if random.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            try:
                await client.stream.send_all(data)
                if random.random() < 0.3:
                    await client.stream.send_eof()
            except trio.BrokenResourceError:
                return
            with trio.move_on_after(random.random() * 0.1):
                await client.wait_closed()

    engine = make_engine(seconds=0.002, repeats=True)
    async with start_gateway(engine, header_seconds=60, write_seconds=60) as gateway:
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)
        files, tasks = _open_files(), trio.lowlevel.current_statistics().tasks_living
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                for _ in range(40):
                    nursery.start_soon(abuse, gateway)
                num_made = engine.num_made
                async with connect(gateway) as client:  # one that leaves in the middle for certain
                    await client.stream.send_all(whole[0])
                    await wait_until(lambda num=num_made: engine.num_made > num)
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)
        assert engine.num_active == 0
        assert gateway.metric("veilpipe_http_active_requests") == 0
        assert _open_files() == files
        await wait_until(lambda: trio.lowlevel.current_statistics().tasks_living == tasks)


def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))
