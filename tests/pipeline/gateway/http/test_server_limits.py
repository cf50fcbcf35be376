"""The gateway on raw sockets: clients that flood it, with connections, bodies or work."""

import json
import socket
import threading

import pytest
import trio

from pipeline.engine.engine import PipelineEngine
from pipeline.engine.limits import Limits
from pipeline.gateway.http import client_exchange
from pipeline.gateway.http.client_exchange import SMALL_BYTES, BodyBudget
from tests.pipeline.gateway.conftest import LONGEST_GAP_SECONDS
from tests.pipeline.gateway.http.raw_requests import (
    AUTH,
    CHAT,
    HEAD,
    USER,
    chat_body,
    start_server,
    wait_until,
)


async def test_a_body_too_large_is_refused_even_without_a_length(start_gateway, connect):
    async with start_gateway(max_body_bytes=1000) as gateway:
        async with connect(gateway) as client:
            await client.post(CHAT, b"x" * 200_000)
            status, _, body = await client.read_response()
        assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
        async with connect(gateway) as client:
            auth = b"authorization: Bearer sk-test-0123456789\r\n"
            head = b"POST %s HTTP/1.1\r\nhost: x\r\n%stransfer-encoding: chunked\r\n\r\n"
            await client.stream.send_all(head % (CHAT.encode(), auth))
            await client.stream.send_all(b"400\r\n" + b"x" * 1024 + b"\r\n")
            status, _, _ = await client.read_response()
        assert status == 413


async def test_a_body_that_says_it_is_too_large_is_refused_before_any_of_it_comes(
    start_gateway, connect, monkeypatch
):
    monkeypatch.setattr(client_exchange, "_DRAIN_SECONDS", 60)
    async with start_gateway(body_seconds=60) as gateway, connect(gateway) as client:
        await client.stream.send_all(HEAD % (CHAT.encode(), 10**15) + AUTH + b"\r\n")
        with trio.fail_after(60):
            status, _, body = await client.read_response()
        assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
        await client.stream.send_all(b"x" * 100_000)  # taken, or it would lose the answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [(b"POST", b"/health", 405), (b"POST", b"/readyz", 405), (b"POST", b"/v1/models", 405),
     (b"POST", b"/nowhere", 404), (b"GET", CHAT.encode(), 405), (b"PUT", CHAT.encode(), 405),
     (b"POST", b"/metrics", 405)],
)  # fmt: skip
async def test_what_takes_no_body_holds_none(start_gateway, connect, method, path, status):
    async with start_gateway(max_body_bytes=1 << 20) as gateway, connect(gateway) as client:
        held = []
        take = BodyBudget.take
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BodyBudget, "take", lambda self, num: (held.append(num), take(self, num)))
            head = HEAD.replace(b"POST", method) % (path, 1 << 19)
            await client.stream.send_all(head + AUTH + b"\r\n" + b"x" * (1 << 19))
            with trio.fail_after(60):
                assert (await client.read_response())[0] == status
        assert not held


@pytest.fixture
def held(monkeypatch):
    """What is taken of budgets for bodies."""
    held, take = [], BodyBudget.take

    def note(self, num_bytes):
        take(self, num_bytes)
        held.append(num_bytes)

    monkeypatch.setattr(BodyBudget, "take", note)
    return held


async def test_bodies_share_a_budget_over_all_connections(start_gateway, connect, held):
    limits = {"max_body_bytes": 1 << 18, "max_buffered_bytes": 1 << 19, "body_seconds": 60}
    async with start_gateway(**limits) as gateway:
        head = HEAD % (CHAT.encode(), 1 << 18) + AUTH + b"\r\n"
        async with connect(gateway) as one, connect(gateway) as two:
            for client in (one, two):
                await client.stream.send_all(head + b" " * ((1 << 18) - 1000))
            await wait_until(lambda: sum(held) == 2 * ((1 << 18) - 1000 - SMALL_BYTES))
            async with connect(gateway) as third:
                await third.stream.send_all(head + b" " * ((1 << 18) - 1000))
                with trio.fail_after(60):
                    status, headers, body = await third.read_response()
            assert (status, headers[b"retry-after"]) == (503, b"1")
            assert json.loads(body)["error"]["code"] == "server_busy"
            # Small requests go on, and the first two as well.
            async with connect(gateway) as small:
                await small.post(CHAT, chat_body())
                assert (await small.read_response())[0] == 200
            request = chat_body()
            await one.stream.send_all(b" " * (1000 - len(request)) + request)
            assert (await one.read_response())[0] == 200
        # What was held is given back, whether it was understood or its client left.
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)
        for _ in range(5):
            async with connect(gateway) as client:
                await client.stream.send_all(head + chat_body().ljust(1 << 18))
                assert (await client.read_response())[0] == 200


async def test_slow_senders_that_hold_the_whole_budget_keep_no_small_body_out(
    start_gateway, connect, held
):
    limits = {"max_body_bytes": 1 << 18, "max_buffered_bytes": 1 << 18, "body_seconds": 60}
    async with start_gateway(**limits) as gateway:
        head = HEAD % (CHAT.encode(), 1 << 18) + AUTH + b"\r\n"
        async with connect(gateway) as one, connect(gateway) as two, connect(gateway) as third:
            await one.stream.send_all(head + b" " * ((1 << 18) - SMALL_BYTES))
            await two.stream.send_all(head + b" " * (3 * SMALL_BYTES - 1))
            await wait_until(lambda: sum(held) == (1 << 18) - 1)
            await third.stream.send_all(head + b" " * (SMALL_BYTES + 2))
            with trio.fail_after(60):
                assert (await third.read_response())[0] == 503
            async with connect(gateway) as small:
                await small.post(CHAT, chat_body().ljust(SMALL_BYTES))
                assert (await small.read_response())[0] == 200


async def test_a_body_counts_until_it_is_token_ids(start_gateway, connect, monkeypatch):
    limits = {"max_body_bytes": 1 << 18, "max_buffered_bytes": 1 << 18}
    body = chat_body().ljust(1 << 18)
    async with start_gateway(**limits) as gateway:
        begun, may_go_on = threading.Event(), threading.Event()
        encode = gateway.desk.tokenizer.encode_rendered

        def slowly(text):
            begun.set()
            assert may_go_on.wait(300)
            return encode(text)

        async def ask():
            async with connect(gateway) as client:
                await client.post(CHAT, body)
                return (await client.read_response())[0]

        async def ask_first():
            assert await ask() == 200

        monkeypatch.setattr(gateway.desk.tokenizer, "encode_rendered", slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_first)
            try:
                await wait_until(begun.is_set)
                assert await ask() == 503
            finally:
                may_go_on.set()
        assert await ask() == 200


async def test_too_many_continuations_are_told_when_to_return(start_gateway, connect, make_engine):
    engine = make_engine(seconds=60)
    async with start_gateway(engine, max_open_choices=10) as gateway, connect(gateway) as one:
        await one.post(CHAT, chat_body(n=8, stream=True))
        await wait_until(lambda: engine.num_active == 8)
        async with connect(gateway) as two:
            await two.post(CHAT, chat_body(n=3))
            status, headers, body = await two.read_response()
            assert (status, headers[b"retry-after"]) == (503, b"1")
            assert json.loads(body)["error"]["code"] == "server_busy"
            await two.post(CHAT, chat_body(n=3, stream=True))
            assert (await two.read_response())[0] == 503


@pytest.mark.parametrize("num", [300, pytest.param(1000, marks=pytest.mark.slow)])
async def test_connections_that_hang_up_at_once_hold_nobody_up(make_desk, heartbeat, num):
    """Five continuations each are theirs."""
    engine = PipelineEngine(Limits(16, 64))
    desk = make_desk(engine, max_open_choices=5000)
    request = chat_body(n=5)
    data = HEAD % (CHAT.encode(), len(request)) + AUTH + b"\r\n" + request
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(start_server, desk)
            port = int(url.rpartition(":")[2])
            clients = await trio.to_thread.run_sync(_connect_many, port, num, data)
            await wait_until(lambda: engine.scheduler.num_waiting == 5 * num)
            async with heartbeat() as gaps:
                await trio.to_thread.run_sync(lambda: [client.close() for client in clients])
                await wait_until(lambda: not engine.scheduler.num_waiting)
            nursery.cancel_scope.cancel()
    assert max(gaps) < LONGEST_GAP_SECONDS


def _connect_many(port, num, data):
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(num)]
    for client in clients:
        client.sendall(data)
    return clients


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_a_huge_answer_holds_nobody_up_while_it_is_written(
    start_gateway, connect, make_engine, heartbeat, path
):
    engine = make_engine(text="x" * 100, repeats=True, max_seq_len=6000)
    asked = {"prompt": "x", "logprobs": 20, "max_tokens": 2000}
    if path == CHAT:
        asked = {"messages": USER, "logprobs": True, "top_logprobs": 20, "max_tokens": 2000}
    async with start_gateway(engine) as gateway, connect(gateway) as client, heartbeat() as gaps:
        await client.post(path, json.dumps({"model": "tiny/model"} | asked).encode())
        with trio.fail_after(60):
            status, _, body = await client.read_response()
    assert status == 200
    assert len(body) > 400_000
    logprobs = json.loads(body)["choices"][0]["logprobs"]
    assert len(logprobs["content" if path == CHAT else "tokens"]) == 2000
    assert max(gaps) < LONGEST_GAP_SECONDS


async def test_a_huge_body_holds_nobody_up_while_it_is_read(start_gateway, connect, heartbeat):
    many = {"model": "tiny/model", "prompt": [1] * 250_000}
    deep = {"model": "tiny/model", "messages": [{"role": "user", "content": "é" * 1_500_000}]}
    async with start_gateway() as gateway, connect(gateway) as client, heartbeat() as gaps:
        for path, body in (("/v1/completions", many), (CHAT, deep)):
            await client.post(path, json.dumps(body).encode()[: 4 << 20])
            with trio.fail_after(30):
                assert (await client.read_response())[0] in {400, 413}
    assert max(gaps) < LONGEST_GAP_SECONDS


async def test_a_body_nobody_reads_leaves_no_connection_behind(start_gateway, connect):
    async with start_gateway() as gateway:
        for path in ("/health", "/v1/models", "/nowhere") * 5:
            async with connect(gateway) as client:
                await client.post(path, b"x" * 1_500_000)
                with trio.fail_after(60):
                    status, _, _ = await client.read_response()
                assert status in {404, 405}
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)


async def test_three_hundred_connections_are_served_and_one_more_is_told(start_gateway, connect):
    async with start_gateway(max_connections=300) as gateway:
        streams = [await trio.open_tcp_stream("127.0.0.1", gateway.port) for _ in range(300)]
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 300)
        async with connect(gateway) as client:
            await client.stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            with trio.fail_after(60):
                status, _, body = await client.read_response()
            assert status == 503
            assert json.loads(body)["error"]["code"] == "too_many_connections"
        done = 0

        async def ask(stream):
            nonlocal done
            await stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            if (await stream.receive_some()).startswith(b"HTTP/1.1 200"):
                done += 1

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(ask, stream)
        assert done == 300
        for stream in streams:
            await stream.aclose()
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)
        async with connect(gateway) as client:
            await client.post(CHAT, chat_body())
            assert (await client.read_response())[0] == 200
