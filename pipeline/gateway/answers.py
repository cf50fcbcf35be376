"""Sends what is generated: whole, or as server-sent events while it comes."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from pipeline.engine.generation import Engine, Generation
from pipeline.errors import PipelineError
from pipeline.gateway.choices import PieceStream, PlacedToken, open_choices
from pipeline.gateway.errors import from_pipeline
from pipeline.gateway.formats import Format
from pipeline.gateway.metrics import RequestRecord
from pipeline.gateway.text import GatewayTokenizer


@dataclass(frozen=True, slots=True)
class Job:
    """A request understood: what to generate and how to write it."""

    model: str
    format: Format
    generations: Sequence[Generation]
    num_prompt: int
    record: RequestRecord
    is_streamed: bool
    includes_usage: bool

    def header(self, object_name: str) -> dict[str, Any]:
        """The fields every answer begins with."""
        return {
            "id": self.format.id_prefix + self.record.request_id,
            "object": object_name,
            "created": int(time.time()),
            "model": self.model,
        }

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.record.num_generated,
            "total_tokens": self.num_prompt + self.record.num_generated,
        }


class Answer:
    """An ASGI response that generates while it is sent. Raises what the engine raises at first."""

    def __init__(self, job: Job, engine: Engine, tokenizer: GatewayTokenizer) -> None:
        self._job = job
        self._engine = engine
        self._tokenizer = tokenizer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send."""
        if self._job.is_streamed:
            await self._stream(send)
        else:
            body = await self._collect()
            await JSONResponse(body)(scope, receive, send)

    async def _collect(self) -> dict[str, Any]:
        job = self._job
        num_choices = len(job.generations)
        texts = [""] * num_choices
        tokens: list[list[PlacedToken]] = [[] for _ in range(num_choices)]
        finishes: list[str | None] = [None] * num_choices
        async with self._open() as pieces:
            async for piece in pieces:
                texts[piece.choice] += piece.text
                tokens[piece.choice] += piece.tokens
                finishes[piece.choice] = piece.finish
        choices = [
            job.format.whole(i, texts[i], tokens[i], finishes[i]) for i in range(num_choices)
        ]
        return job.header(job.format.whole_object) | {"choices": choices, "usage": job.usage()}

    async def _stream(self, send: Send) -> None:
        job = self._job
        header = job.header(job.format.chunk_object)
        no_usage = {"usage": None} if job.includes_usage else {}
        async with self._open() as pieces:
            events = EventWriter(send)
            await events.open()
            try:
                for choice in range(len(job.generations)):
                    opening = job.format.opening(choice)
                    if opening is not None:
                        await events.write(header | {"choices": [opening]} | no_usage)
                async for piece in pieces:
                    if piece.text or piece.tokens or piece.finish:
                        delta = job.format.delta(piece)
                        await events.write(header | {"choices": [delta]} | no_usage)
            except PipelineError as error:
                # The status is sent: the stream itself must say that it is not whole.
                await events.close(from_pipeline(error).to_json())
                return
        if job.includes_usage:
            await events.write(header | {"choices": [], "usage": job.usage()})
        await events.close("[DONE]")

    def _open(self) -> AbstractAsyncContextManager[PieceStream]:
        job = self._job
        return open_choices(self._engine, self._tokenizer, job.generations, job.record)


class EventWriter:
    """Server-sent events. Source: WHATWG HTML, section 9.2."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def open(self) -> None:
        """Begin; each event is sent at once, and no proxy should wait for more."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: Mapping[str, Any]) -> None:
        """Send one event."""
        await self._body(data, more_body=True)

    async def close(self, data: Mapping[str, Any] | str) -> None:
        """Send the last event and end the response."""
        await self._body(data, more_body=False)

    async def _body(self, data: Mapping[str, Any] | str, *, more_body: bool) -> None:
        text = data if isinstance(data, str) else _dump(data)
        body = f"data: {text}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": more_body})


def _dump(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
