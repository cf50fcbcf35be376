"""Continuations on their way from the engine's tokens to pieces of text."""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from pipeline.engine.generation import Engine, Generation, TokenOutput
from pipeline.engine.request import FinishReason
from pipeline.engine.text import StoppedText
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import PipelineError, SessionError
from pipeline.gateway.metrics import RequestRecord
from pipeline.tasks import open_tasks


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token, and at which character of the continuation its text begins."""

    offset: int
    output: TokenOutput


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What one more token made certain of a continuation; `finish` ("stop", "length") ends it."""

    choice: int
    text: str
    tokens: tuple[PlacedToken, ...]
    finish: str | None


class ChoiceText:
    """Turns one continuation's tokens into pieces, and ends it at a stop string."""

    def __init__(
        self, choice: int, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]
    ) -> None:
        self._choice = choice
        self._text = StoppedText(tokenizer, prompt_ids, stops)
        self._held: list[PlacedToken] = []
        self._num_emitted = 0

    def push(self, output: TokenOutput) -> TextPiece:
        """Take the next token. The one that ends a text is no part of it."""
        is_eos = output.finish is FinishReason.EOS
        certain, is_stopped = "", False
        if not is_eos:
            self._held.append(PlacedToken(self._text.num_decoded, output))
            certain, is_stopped = self._text.push(output.token_id)
        if output.finish is not None and not is_stopped:
            rest, is_stopped = self._text.finish()
            certain += rest
        self._num_emitted += len(certain)
        if is_stopped or is_eos:
            finish: str | None = "stop"
        else:
            finish = None if output.finish is None else "length"
        is_whole = finish is not None and not is_stopped
        return TextPiece(self._choice, certain, self._release(is_whole), finish)

    def _release(self, is_whole: bool) -> tuple[PlacedToken, ...]:
        """Tokens whose text has begun to be emitted; at an end without stop string, the rest."""
        count = 0
        while count < len(self._held) and (
            is_whole or self._held[count].offset < self._num_emitted
        ):
            count += 1
        released, self._held = self._held[:count], self._held[count:]
        return tuple(released)


class PieceStream:
    """The pieces of all continuations of a request, as they come."""

    def __init__(
        self, pieces: trio.MemoryReceiveChannel[TextPiece | PipelineError], num_choices: int
    ) -> None:
        self._pieces = pieces
        self._num_open = num_choices

    def __aiter__(self) -> AsyncIterator[TextPiece]:
        return self

    async def __anext__(self) -> TextPiece:
        """The next piece. Raises what the engine raised."""
        if self._num_open == 0:
            raise StopAsyncIteration
        piece = await self._pieces.receive()
        if isinstance(piece, PipelineError):
            raise piece
        self._num_open -= piece.finish is not None
        return piece


@asynccontextmanager
async def open_choices(
    engine: Engine, tokenizer: Tokenizer, generations: Sequence[Generation], record: RequestRecord
) -> AsyncIterator[PieceStream]:
    """Generate all continuations at once; leaving aborts those under way.

    Raises what the engine raises when it refuses one. Tokens are taken from the engine as they
    come, so a client that reads slowly holds up nobody; a request's tokens are bounded, and so is
    what waits here.
    """
    sender, receiver = trio.open_memory_channel[TextPiece | PipelineError](math.inf)
    async with open_tasks() as tasks:
        for choice, generation in enumerate(generations):
            stops = generation.sampling.stop
            text = ChoiceText(choice, tokenizer, generation.prompt_ids, stops)
            await tasks.start(_follow, engine, generation, text, sender, record, choice)
        yield PieceStream(receiver, len(generations))
        tasks.cancel_scope.cancel()


async def _follow(
    engine: Engine,
    generation: Generation,
    text: ChoiceText,
    sender: trio.MemorySendChannel[TextPiece | PipelineError],
    record: RequestRecord,
    choice: int,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    async with engine.generate(generation) as outputs:
        task_status.started()
        try:
            async for output in outputs:
                record.add_token(choice)
                piece = text.push(output)
                sender.send_nowait(piece)
                if piece.finish is not None:
                    return
            sender.send_nowait(SessionError("the engine ended a request without a reason"))
        except PipelineError as error:
            sender.send_nowait(error)
