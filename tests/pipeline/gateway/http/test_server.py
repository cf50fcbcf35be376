"""The gateway on raw sockets: clients that leave, stall, flood or talk nonsense."""

import json
import logging
import socket
import struct
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio
from prometheus_client import CollectorRegistry

from pipeline.engine.engine import PipelineEngine
from pipeline.engine.scheduler import Limits
from pipeline.errors import InputError
from pipeline.gateway.http.exchange import BodyBudget
from pipeline.gateway.http.server import serve

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


def chat_body(**kwargs):
    return json.dumps({"model": "tiny/model", "messages": USER} | kwargs).encode()


async def wait_until(condition, seconds=10):
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event)
            await trio.sleep(0.005)


async def test_a_stream_is_sent_as_events_and_ends_with_done(start_gateway, connect):
    async with start_gateway() as gateway, connect(gateway) as client:
        await client.post(CHAT, chat_body(stream=True))
        data = await client.read_until(b"0\r\n\r\n")
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"content-type: text/event-stream" in head
    assert b"data: [DONE]\n\n" in body
    assert body.count(b"data: ") == 16  # role, 13 characters, finish, done


async def test_a_connection_serves_one_request_after_another(start_gateway, connect):
    async with start_gateway() as gateway, connect(gateway) as client:
        for _ in range(3):
            await client.post(CHAT, chat_body())
            status, headers, _ = await client.read_response()
            assert status == 200
        assert len(headers[b"x-request-id"]) == 32


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
            with trio.fail_after(10):
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
            with trio.fail_after(10):
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
    with trio.fail_after(5):
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
    async with start_gateway(header_seconds=0.3) as gateway, connect(gateway) as client:
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
            with trio.fail_after(10):
                await client.wait_closed()
            nursery.cancel_scope.cancel()


async def test_a_body_that_never_ends_is_cut_off(start_gateway, connect):
    async with start_gateway(body_seconds=0.2) as gateway, connect(gateway) as client:
        await client.post(CHAT, b'{"model"', length=1000)
        with trio.fail_after(10):
            status, _, body = await client.read_response()
            await client.wait_closed()
        assert status == 408
        assert json.loads(body)["error"]["code"] == "request_timeout"


async def test_an_idle_connection_is_closed(start_gateway, connect):
    async with start_gateway(header_seconds=0.2) as gateway, connect(gateway) as client:
        await client.post(CHAT, chat_body())
        assert (await client.read_response())[0] == 200
        with trio.fail_after(10):
            assert await client.wait_closed() == b""


async def test_a_connection_its_client_closed_is_given_up_at_once(start_gateway, connect):
    async with start_gateway(header_seconds=60) as gateway:
        async with connect(gateway):
            await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 1)
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)


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


@pytest.mark.parametrize("key", [None, "sk-wrong", "sk-test-012345678", "", "é"])
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/metrics", "/pipeline", "/nowhere"])
async def test_without_the_key_nothing_but_health_answers(start_gateway, connect, key, path):
    async with start_gateway() as gateway:
        async with connect(gateway) as client:
            await client.post(path, b"x" * 100_000, key=key)
            status, headers, body = await client.read_response()
        assert status == 401
        assert headers[b"www-authenticate"] == b"Bearer"
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert not gateway.engine.generations
        async with connect(gateway) as client:
            await client.stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await client.read_response())[0] == 200


HEAD = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n"
AUTH = b"authorization: Bearer sk-test-0123456789\r\n"


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
            with trio.fail_after(10):
                assert (await client.read_response())[0] == status
        assert not held


async def test_without_the_key_no_body_is_held(start_gateway, connect, monkeypatch):
    monkeypatch.setattr(BodyBudget, "take", lambda *_: pytest.fail("was held"))
    async with start_gateway(body_seconds=60) as gateway, connect(gateway) as client:
        # Not even waited for: half of it never comes.
        await client.stream.send_all(HEAD % (CHAT.encode(), 100_000) + b"\r\n" + b"x" * 50_000)
        with trio.fail_after(5):
            assert (await client.read_response())[0] == 401


async def test_bodies_share_a_budget_over_all_connections(start_gateway, connect):
    limits = {"max_body_bytes": 1 << 18, "max_buffered_bytes": 1 << 19, "body_seconds": 60}
    async with start_gateway(**limits) as gateway:
        head = HEAD % (CHAT.encode(), 1 << 18) + AUTH + b"\r\n"
        async with connect(gateway) as one, connect(gateway) as two:
            for client in (one, two):
                await client.stream.send_all(head + b" " * ((1 << 18) - 1000))
            await trio.sleep(0.2)
            async with connect(gateway) as third:
                await third.stream.send_all(head + b" " * ((1 << 18) - 1000))
                with trio.fail_after(10):
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


async def test_a_thousand_connections_that_hang_up_at_once_hold_nobody_up(make_desk, heartbeat):
    """Five thousand continuations are theirs."""
    engine = PipelineEngine(Limits(16, 64))
    desk = make_desk(engine, max_open_choices=5000)
    request = chat_body(n=5)
    data = HEAD % (CHAT.encode(), len(request)) + AUTH + b"\r\n" + request
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(_start, desk)
            port = int(url.rpartition(":")[2])
            clients = await trio.to_thread.run_sync(_connect_many, port, 1000, data)
            await wait_until(lambda: engine.scheduler.num_waiting == 5000, seconds=60)
            async with heartbeat() as gaps:
                await trio.to_thread.run_sync(lambda: [client.close() for client in clients])
                await wait_until(lambda: not engine.scheduler.num_waiting, seconds=60)
            nursery.cancel_scope.cancel()
    assert max(gaps) < 0.05


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
    asked = {"prompt": "x", "logprobs": 20, "max_tokens": 5000}
    if path == CHAT:
        asked = {"messages": USER, "logprobs": True, "top_logprobs": 20, "max_tokens": 5000}
    async with start_gateway(engine) as gateway, connect(gateway) as client, heartbeat() as gaps:
        await client.post(path, json.dumps({"model": "tiny/model"} | asked).encode())
        with trio.fail_after(60):
            status, _, body = await client.read_response()
    assert status == 200
    assert len(body) > 1_000_000
    logprobs = json.loads(body)["choices"][0]["logprobs"]
    assert len(logprobs["content" if path == CHAT else "tokens"]) == 5000
    assert max(gaps) < 0.05


async def test_a_huge_body_holds_nobody_up_while_it_is_read(start_gateway, connect, heartbeat):
    many = {"model": "tiny/model", "prompt": [1] * 250_000}
    deep = {"model": "tiny/model", "messages": [{"role": "user", "content": "é" * 1_500_000}]}
    async with start_gateway() as gateway, connect(gateway) as client, heartbeat() as gaps:
        for path, body in (("/v1/completions", many), (CHAT, deep)):
            await client.post(path, json.dumps(body).encode()[: 4 << 20])
            with trio.fail_after(30):
                assert (await client.read_response())[0] in {400, 413}
    assert max(gaps) < 0.05


async def test_readiness_is_the_engines(start_gateway, connect):
    ready = False
    async with start_gateway(is_ready=lambda: ready) as gateway, connect(gateway) as client:
        for ready, expected in ((False, 503), (True, 200)):  # noqa: B007
            await client.stream.send_all(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await client.read_response())[0] == expected


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: " + b"b" * 70_000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\r\n" * 100,
        b"\x00" * 100_000,
    ],
    ids=range(13),
)
async def test_bytes_that_are_no_request_end_their_connection_only(
    start_gateway, connect, make_engine, junk
):
    engine = make_engine(seconds=0.01, repeats=True)
    async with start_gateway(engine, header_seconds=0.3) as gateway, connect(gateway) as good:
        await good.post(CHAT, chat_body(stream=True))
        async with connect(gateway) as client:
            with trio.fail_after(10):
                try:
                    await client.stream.send_all(junk)
                except trio.BrokenResourceError:
                    pass
                answer = await client.wait_closed()
        assert not answer.startswith(b"HTTP/1.1 2")
        assert not answer.startswith(b"HTTP/1.1 5")
        made = engine.num_made
        await good.read_until(b"!")
        await wait_until(lambda: engine.num_made > made)
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 1)


async def test_a_websocket_is_refused(start_gateway, connect):
    async with start_gateway() as gateway, connect(gateway) as client:
        await client.stream.send_all(
            b"GET /v1/models HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n\r\n"
        )
        with trio.fail_after(10):
            answer = await client.read_until(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403")


async def test_a_body_nobody_reads_leaves_no_connection_behind(start_gateway, connect):
    async with start_gateway() as gateway:
        for path in ("/health", "/v1/models", "/nowhere") * 5:
            async with connect(gateway) as client:
                await client.post(path, b"x" * 1_500_000)
                with trio.fail_after(10):
                    status, _, _ = await client.read_response()
                assert status in {404, 405}
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)


async def test_pipelined_requests_are_answered_in_turn(start_gateway, connect):
    async with start_gateway() as gateway, connect(gateway) as client:
        await client.stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
        data = b""
        with trio.fail_after(10):
            while data.count(b'{"status":"ok"}') < 3:
                data += await client.read_until(b"ok")


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


async def test_three_hundred_connections_are_served_and_one_more_is_told(start_gateway, connect):
    async with start_gateway(max_connections=300) as gateway:
        streams = [await trio.open_tcp_stream("127.0.0.1", gateway.port) for _ in range(300)]
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 300)
        async with connect(gateway) as client:
            await client.stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            with trio.fail_after(10):
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


async def test_requests_are_logged_without_their_content(start_gateway, connect, caplog):
    caplog.set_level(logging.DEBUG)
    async with start_gateway() as gateway, connect(gateway) as client:
        secret = [{"role": "user", "content": "xyzzy"}]
        await client.post(CHAT, chat_body(messages=secret, user="xyzzy"))
        status, headers, _ = await client.read_response()
        assert status == 200
        await client.post("/xyzzy", b"xyzzy", headers=b"x-request-id: xyzzy\r\n")
        assert (await client.read_response())[0] == 404
        await wait_until(lambda: len(_lines(caplog)) == 2)
    first, second = _lines(caplog)
    assert (first["route"], first["status"]) == (CHAT, "200")
    assert first["completion_tokens"] == "15"
    assert first["request_id"].encode() == headers[b"x-request-id"]
    assert 0 < float(first["ttft_ms"]) <= float(first["total_ms"])
    assert (second["route"], second["status"], second["ttft_ms"]) == ("other", "404", "None")
    assert "xyzzy" not in caplog.text
    assert "Hello" not in caplog.text
    assert "sk-test" not in caplog.text


def _lines(caplog):
    records = [r for r in caplog.records if r.name == "pipeline.gateway.metrics"]
    return [dict(word.split("=") for word in record.getMessage().split()) for record in records]


async def test_metrics_count_requests_and_tokens(start_gateway, connect):
    async with start_gateway() as gateway, connect(gateway) as client:
        await client.post(CHAT, chat_body())
        await client.read_response()
        auth = b"authorization: Bearer sk-test-0123456789\r\n"
        await client.stream.send_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n" + auth + b"\r\n")
        status, headers, body = await client.read_response()
    assert status == 200
    assert headers[b"content-type"].startswith(b"text/plain")
    lines = body.decode().splitlines()
    assert "veilpipe_generated_tokens_total 15.0" in lines
    assert "veilpipe_ttft_seconds_count 1.0" in lines
    assert "veilpipe_inter_token_seconds_count 14.0" in lines
    assert f'veilpipe_http_requests_total{{route="{CHAT}",status="200"}} 1.0' in lines


async def test_a_defect_is_a_plain_500_and_the_server_goes_on(
    start_gateway, connect, make_engine, caplog
):
    engine = make_engine(fail_at=0, error=ZeroDivisionError("secret detail"))
    async with start_gateway(engine) as gateway, connect(gateway) as client:
        await client.post(CHAT, chat_body())
        status, _, body = await client.read_response()
        assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
        engine.fail_at = None
        await client.post(CHAT, chat_body())
        assert (await client.read_response())[0] == 200
    assert b"secret" not in body
    assert "secret" not in caplog.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"host: localhost:8000\r\n", 200),
        (b"host: 127.0.0.1\r\n", 200),
        (b"host: [::1]:8000\r\n", 200),
        (b"host: evil.example\r\n", 403),
        (b"host: localhost.evil.example\r\n", 403),
        (b"host: localhost\r\norigin: https://evil.example\r\n", 403),
        (b"host: localhost\r\norigin: null\r\n", 403),
        (b"host: localhost\r\norigin: http://localhost:3000\r\n", 200),
    ],
)
async def test_without_keys_only_this_machines_programs_are_served(
    start_gateway, connect, headers, status
):
    async with start_gateway(keys=()) as gateway, connect(gateway) as client:
        await client.stream.send_all(b"GET /v1/models HTTP/1.1\r\n" + headers + b"\r\n")
        assert (await client.read_response())[0] == status


def desk_at(make_desk, host="127.0.0.1", port=0, **kwargs):
    desk = make_desk(**kwargs)
    desk.config = replace(desk.config, host=host, port=port)
    return desk


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_without_a_key_only_loopback_is_listened_on(make_desk, host):
    with pytest.raises(InputError, match="no API key"):
        await serve(desk_at(make_desk, host, keys=()), CollectorRegistry())


async def _start(desk, *, task_status):
    await serve(desk, CollectorRegistry(), task_status=task_status)


async def test_with_a_key_any_address_is_listened_on_and_the_danger_is_said(make_desk, caplog):
    async with trio.open_nursery() as nursery:
        started = await nursery.start(_start, desk_at(make_desk, "0.0.0.0"))
        assert started.startswith("http://0.0.0.0:")
        nursery.cancel_scope.cancel()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "event=plain_http" in warning
    assert "--tls-cert" in warning


async def test_on_loopback_there_is_no_danger_to_speak_of(start_gateway, caplog):
    async with start_gateway():
        pass
    assert "plain_http" not in caplog.text


async def test_an_address_in_use_is_the_users_error(make_desk, start_gateway):
    async with start_gateway() as gateway:
        with pytest.raises(InputError, match="cannot listen"):
            await serve(desk_at(make_desk, port=gateway.port), CollectorRegistry())


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
        await wait_until(lambda: gateway.metric("veilpipe_http_connections") == 0)
        assert engine.generations
        assert engine.num_active == 0
        assert gateway.metric("veilpipe_http_active_requests") == 0
        assert _open_files() == files
        await wait_until(lambda: trio.lowlevel.current_statistics().tasks_living == tasks)


def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))
