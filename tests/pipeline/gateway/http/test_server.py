"""The gateway on raw sockets: answers, logs and metrics, and clients that talk nonsense."""

import json
import logging
import re
from pathlib import Path

import pytest
import trio

import pipeline.gateway
from pipeline.gateway.readiness import Awaited, Phase, Readiness
from tests.pipeline.gateway.http.raw_requests import CHAT, chat_body, wait_until


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


PROBES = ("/livez", "/readyz", "/health")
# A server is not drained, only one of its pipelines is, and only while there is another.
PHASES = [phase for phase in Phase if phase is not Phase.DRAINING]
MANUAL = Path(pipeline.gateway.__file__).parent / "SERVING.md"


def documented_probes():
    """The manual's table of what probes are answered: status codes by phase."""
    row = re.compile(r"^\| `(\w+)` \|.*\| (\d+) \| (\d+) \| (\d+) \|", re.MULTILINE)
    rows = row.findall(MANUAL.read_text())
    return {phase: tuple(map(int, codes)) for phase, *codes in rows}


@pytest.mark.parametrize("phase", PHASES)
async def test_probes_are_answered_as_the_manual_says(start_gateway, connect, phase):
    readiness = Readiness(phase, (Awaited(1, 2.5),))
    async with start_gateway(readiness=lambda: readiness) as gateway, connect(gateway) as client:
        found = []
        for path in PROBES:
            await client.stream.send_all(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode())
            status, _, body = await client.read_response()
            found.append(status)
    assert tuple(found) == documented_probes()[phase]
    assert json.loads(body) == {"status": phase, "awaited": [{"stage": 1, "seconds": 2.5}]}


async def test_what_is_known_of_a_stage_that_is_awaited_is_told(start_gateway, connect):
    awaited = (Awaited(0, 1.5, 10, 40), Awaited(1, 2.5, problem="its worker cannot start"))
    readiness = Readiness(Phase.STARTING, awaited)
    async with start_gateway(readiness=lambda: readiness) as gateway, connect(gateway) as client:
        await client.stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        _, _, body = await client.read_response()
    assert json.loads(body)["awaited"] == [
        {"stage": 0, "seconds": 1.5, "loaded_bytes": 10, "total_bytes": 40},
        {"stage": 1, "seconds": 2.5, "problem": "its worker cannot start"},
    ]


def test_the_manual_has_a_row_for_every_phase():
    assert documented_probes().keys() == set(PHASES)


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
            with trio.fail_after(120):
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
        with trio.fail_after(120):
            answer = await client.read_until(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403")


async def test_pipelined_requests_are_answered_in_turn(start_gateway, connect):
    async with start_gateway() as gateway, connect(gateway) as client:
        await client.stream.send_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
        data = b""
        with trio.fail_after(120):
            while data.count(b'{"status":"ok"}') < 3:
                data += await client.read_until(b"ok")


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
