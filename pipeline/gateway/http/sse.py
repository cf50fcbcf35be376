"""Server-sent events, as streamed answers travel."""

from collections.abc import Mapping
from typing import Any

from starlette.types import Send

from pipeline.gateway.http.completion_formats import dump

EVENT_STREAM = b"text/event-stream; charset=utf-8"


async def open_stream(send: Send, media_type: bytes) -> None:
    """Begin an answer whose parts are sent at once, and no proxy should wait for more."""
    headers = [
        (b"content-type", media_type),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


class EventWriter:
    """Server-sent events. Source: WHATWG HTML, section 9.2."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def open(self) -> None:
        """Begin."""
        await open_stream(self._send, EVENT_STREAM)

    async def write(self, data: Mapping[str, Any]) -> None:
        """Send one event."""
        await self._body(dump(data), more_body=True)

    async def close(self, data: bytes) -> None:
        """Send the last event and end the response."""
        await self._body(data, more_body=False)

    async def _body(self, data: bytes, *, more_body: bool) -> None:
        body = b"data: %b\n\n" % data
        await self._send({"type": "http.response.body", "body": body, "more_body": more_body})
