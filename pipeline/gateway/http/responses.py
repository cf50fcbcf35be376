"""Sends what is generated: whole, or as server-sent events while it comes."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import trio
from starlette.types import Receive, Scope, Send

from pipeline.errors import PipelineError
from pipeline.gateway.continuations import TextPiece
from pipeline.gateway.desk import Desk, Job
from pipeline.gateway.errors import from_pipeline
from pipeline.gateway.http.completion_formats import Format, WholeChoice, dump
from pipeline.gateway.http.sse import EventWriter

# An answer is sent in parts of so many bytes, each of which the client has its time to read.
_PART_BYTES = 1 << 16
# While those of a large one are put together, others' tokens get their turn.
_PARTS_A_TURN = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a job's answer is to be written."""

    format: Format
    is_streamed: bool
    includes_usage: bool
    # What is said of a choice when its first token comes, and behind all choices of a whole answer.
    echoed: Callable[[int], Iterator[dict[str, Any]]] | None = None
    more: Callable[[], Iterator[bytes]] | None = None


class Answer:
    """An ASGI response that generates while it is sent. Raises what the engine raises at first."""

    def __init__(self, desk: Desk, job: Job, wanted: Wanted) -> None:
        self._desk = desk
        self._job = job
        self._wanted = wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send."""
        del scope, receive
        if self._wanted.is_streamed:
            await self._stream(send)
        else:
            await send_json(send, await self._collect())

    async def _collect(self) -> bytes:
        job, format_ = self._job, self._wanted.format
        choices = [format_.whole(choice) for choice in range(len(job.generations))]
        async with self._desk.generate(job) as pieces:
            async for piece in pieces:
                choices[piece.choice].add(piece)
        body = bytearray()
        for i, part in enumerate(self._whole(choices)):
            body += part
            if i % _PARTS_A_TURN == 0:
                await trio.lowlevel.checkpoint()
        return bytes(body)

    def _whole(self, choices: Sequence[WholeChoice]) -> Iterator[bytes]:
        yield dump(self._header(self._wanted.format.whole_object)).removesuffix(b"}")
        yield b',"choices":['
        for i, choice in enumerate(choices):
            if i:
                yield b","
            yield from choice.to_json()
        yield b'],"usage":%b' % dump(self._usage())
        if self._wanted.more is not None:
            yield from self._wanted.more()
        yield b"}"

    async def _stream(self, send: Send) -> None:
        wanted = self._wanted
        header = self._header(wanted.format.chunk_object)
        no_usage = {"usage": None} if wanted.includes_usage else {}
        async with self._desk.generate(self._job) as pieces:
            events = EventWriter(send)
            await events.open()
            try:
                for choice in range(len(self._job.generations)):
                    opening = wanted.format.opening(choice)
                    if opening is not None:
                        await events.write(header | {"choices": [opening]} | no_usage)
                begun = set[int]()
                async for piece in pieces:
                    for delta in self._deltas(piece, begun):
                        await events.write(header | {"choices": [delta]} | no_usage)
            except PipelineError as error:
                # The status is sent: the stream itself must say that it is not whole.
                await events.write(from_pipeline(error).to_json())
                await events.close(b"[DONE]")
                return
        if wanted.includes_usage:
            await events.write(header | {"choices": [], "usage": self._usage()})
        await events.close(b"[DONE]")

    def _deltas(self, piece: TextPiece, begun: set[int]) -> Iterator[dict[str, Any]]:
        """What a stream says of a piece; of the first of a choice what is echoed, too."""
        if self._wanted.echoed is not None and piece.choice not in begun:
            begun.add(piece.choice)
            yield from self._wanted.echoed(piece.choice)
        if piece.says_something:
            yield self._wanted.format.delta(piece)

    def _header(self, object_name: str) -> dict[str, Any]:
        """The fields every answer begins with."""
        return {
            "id": self._wanted.format.id_prefix + self._job.record.request_id,
            "object": object_name,
            "created": int(time.time()),
            "model": self._desk.config.served_model_name,
        }

    def _usage(self) -> dict[str, Any]:
        """Tokens so far."""
        num_prompt, num_generated = self._job.num_prompt, self._job.record.num_generated
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": self._job.num_cached},
        }


async def send_json(send: Send, body: bytes) -> None:
    """Send a whole answer."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for start in range(0, len(body), _PART_BYTES):
        end = start + _PART_BYTES
        more_body = end < len(body)
        await send({"type": "http.response.body", "body": body[start:end], "more_body": more_body})
