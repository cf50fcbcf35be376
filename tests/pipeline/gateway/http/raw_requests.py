"""Requests as bytes, and a gateway to send them to."""

import json

import trio
from prometheus_client import CollectorRegistry

from pipeline.gateway.http.server import serve

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
HEAD = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n"
AUTH = b"authorization: Bearer sk-test-0123456789\r\n"


def chat_body(**kwargs):
    return json.dumps({"model": "tiny/model", "messages": USER} | kwargs).encode()


async def wait_until(condition, seconds=60):
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event)
            await trio.sleep(0.005)


async def start_server(desk, *, task_status):
    await serve(desk, CollectorRegistry(), task_status=task_status)
