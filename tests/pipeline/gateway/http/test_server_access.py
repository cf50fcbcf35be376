"""The gateway on raw sockets: who is served, and where it listens."""

import json
import logging
from dataclasses import replace

import pytest
import trio
from prometheus_client import CollectorRegistry

from pipeline.errors import InputError
from pipeline.gateway.http.client_exchange import BodyBudget
from pipeline.gateway.http.server import serve
from tests.pipeline.gateway.http.raw_requests import CHAT, HEAD, start_server


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


async def test_without_the_key_no_body_is_held(start_gateway, connect, monkeypatch):
    monkeypatch.setattr(BodyBudget, "take", lambda *_: pytest.fail("was held"))
    async with start_gateway(body_seconds=60) as gateway, connect(gateway) as client:
        # Not even waited for: half of it never comes.
        await client.stream.send_all(HEAD % (CHAT.encode(), 100_000) + b"\r\n" + b"x" * 50_000)
        with trio.fail_after(60):
            assert (await client.read_response())[0] == 401


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


async def test_with_a_key_any_address_is_listened_on_and_the_danger_is_said(make_desk, caplog):
    async with trio.open_nursery() as nursery:
        started = await nursery.start(start_server, desk_at(make_desk, "0.0.0.0"))
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
