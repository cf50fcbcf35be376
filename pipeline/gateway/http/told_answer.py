"""Sends what a dialect tells of an answer: whole, or event by event while it comes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from pipeline.errors import PipelineError
from pipeline.gateway.desk import Desk, Job
from pipeline.gateway.dialects.telling import Event, Telling
from pipeline.gateway.errors import from_pipeline
from pipeline.gateway.http.completion_formats import dump
from pipeline.gateway.http.responses import send_json
from pipeline.gateway.http.sse import EVENT_STREAM, open_stream


@dataclass(frozen=True, slots=True)
class Wire:
    """How events travel."""

    media_type: bytes
    encode: Callable[[Event], bytes]


def _named_event(event: Event) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), dump(event))


def _line(event: Event) -> bytes:
    return dump(event) + b"\n"


NAMED_EVENTS = Wire(EVENT_STREAM, _named_event)
LINES = Wire(b"application/x-ndjson", _line)


class ToldAnswer:
    """An ASGI response that generates while it is sent. Raises what the engine raises at first."""

    def __init__(self, desk: Desk, job: Job, telling: Telling, wire: Wire | None) -> None:
        """`wire` None: the answer is sent whole."""
        self._desk = desk
        self._job = job
        self._telling = telling
        self._wire = wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send."""
        del scope, receive
        if self._wire is None:
            await send_json(send, await self._collect())
        else:
            await self._stream(send, self._wire)

    async def _collect(self) -> bytes:
        _unheard(self._telling.begin())
        async with self._desk.generate(self._job) as pieces:
            async for piece in pieces:
                _unheard(self._telling.more(piece))
        _unheard(self._telling.end())
        return dump(self._telling.whole())

    async def _stream(self, send: Send, wire: Wire) -> None:
        async def tell(events: Iterable[Event]) -> None:
            # Each is written before the next is made, for they may share what changes.
            body = b"".join(map(wire.encode, events))
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        async with self._desk.generate(self._job) as pieces:
            await open_stream(send, wire.media_type)
            try:
                await tell(self._telling.begin())
                async for piece in pieces:
                    await tell(self._telling.more(piece))
                await tell(self._telling.end())
            except PipelineError as error:
                # The status is sent: the stream itself must say that it is not whole.
                await tell(self._telling.fail(from_pipeline(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _unheard(events: Iterable[Event]) -> None:
    """Have them made, since making them is what takes the answer in."""
    for _ in events:
        pass
