"""Continuations on their way from the engine's tokens to pieces of text."""

import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace

import trio

from pipeline.engine.generation import Engine, Generation, TokenOutput
from pipeline.engine.output_text import StoppedText
from pipeline.engine.request import FinishReason
from pipeline.errors import PipelineError, SessionError
from pipeline.gateway.answer_parts import AnswerReader
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.metrics import RequestRecord
from pipeline.gateway.tool_parser import CallDelta
from pipeline.protocol.result_kinds import NO_TOKEN
from pipeline.tasks import open_tasks

# Ending so many continuations takes a millisecond.
_LEAVING_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token, and at which character of the continuation its text begins."""

    offset: int
    output: TokenOutput


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What one more token made certain of a continuation.

    `finish` ("stop", "length", "tool_calls") ends it; `stop`: the stop string that did.
    """

    choice: int
    text: str
    tokens: tuple[PlacedToken, ...]
    finish: str | None
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    stop: str | None = None

    @property
    def says_something(self) -> bool:
        """Whether a stream has to tell of it."""
        has_logprobs = any(placed.output.logprob is not None for placed in self.tokens)
        return bool(self.text or self.reasoning or self.calls or self.finish or has_logprobs)


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What of a continuation is shown beside its text: special tokens, what ended it.

    `new_reader`: what takes its text apart. `shown`: special tokens that are shown in any case.
    `ends_with_call`: it ends with its first call of a tool.
    """

    shows_special_tokens: bool = False
    includes_stop: bool = False
    new_reader: Callable[[], AnswerReader] | None = None
    shown: frozenset[str] = frozenset()
    ends_with_call: bool = False


_AS_USUAL = TextOptions()


class ChoiceText:
    """Turns one continuation's tokens into pieces, and ends it at a stop string."""

    def __init__(
        self,
        choice: int,
        tokenizer: GatewayTokenizer,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        options: TextOptions = _AS_USUAL,
    ) -> None:
        self._choice = choice
        self._includes_stop = options.includes_stop
        self._ends_with_call = options.ends_with_call
        self._reader = None if options.new_reader is None else options.new_reader()
        self._text = StoppedText(
            tokenizer,
            prompt_ids,
            stops,
            shows_special_tokens=options.shows_special_tokens,
            shown=options.shown,
        )
        self._held: list[PlacedToken] = []
        self._num_emitted = 0

    def push(self, output: TokenOutput) -> TextPiece:
        """Take the next token. The one that ends a text is no part of it."""
        if output.token_id == NO_TOKEN:
            return TextPiece(self._choice, "", (), "length")
        is_eos = output.finish is FinishReason.EOS
        certain, is_stopped = "", False
        if self._includes_stop or not is_eos:
            self._held.append(PlacedToken(self._text.num_decoded, output))
            certain, is_stopped = self._text.push(output.token_id)
        if output.finish is not None and not is_stopped:
            rest, is_stopped = self._text.finish()
            certain += rest
        if is_stopped and self._includes_stop:
            certain += self._text.stop or ""
        self._num_emitted += len(certain)
        if is_stopped or is_eos:
            finish: str | None = "stop"
        else:
            finish = None if output.finish is None else "length"
        is_whole = finish is not None and not is_stopped
        stop = self._text.stop if is_stopped else None
        piece = TextPiece(self._choice, certain, self._release(is_whole), finish, stop=stop)
        return piece if self._reader is None else self._taken_apart(piece, self._reader)

    def _taken_apart(self, piece: TextPiece, reader: AnswerReader) -> TextPiece:
        parts = reader.push(piece.text, is_last=piece.finish is not None)
        finish = piece.finish
        is_done = self._ends_with_call and reader.num_ended > 0
        if reader.num_calls and (is_done or finish == "stop"):
            finish = "tool_calls"
        calls = parts.calls
        if self._ends_with_call:
            calls = tuple(call for call in calls if call.index == 0)
        return replace(
            piece, text=parts.text, reasoning=parts.reasoning, calls=calls, finish=finish
        )

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
        self,
        pieces: trio.MemoryReceiveChannel[TextPiece | PipelineError],
        num_choices: int,
        in_time: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._pieces = pieces
        self._num_open = num_choices
        self._in_time = in_time

    def __aiter__(self) -> AsyncIterator[TextPiece]:
        return self

    async def __anext__(self) -> TextPiece:
        """The next piece. Raises what the engine raised, and RequestTimedOut."""
        if self._num_open == 0:
            raise StopAsyncIteration
        with self._in_time():
            piece = await self._pieces.receive()
        if isinstance(piece, PipelineError):
            raise piece
        self._num_open -= piece.finish is not None
        return piece


@asynccontextmanager
async def open_choices(
    engine: Engine,
    tokenizer: GatewayTokenizer,
    generations: Sequence[Generation],
    options: TextOptions,
    record: RequestRecord,
    leaving: trio.Lock,
    in_time: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> AsyncIterator[PieceStream]:
    """Generate all continuations at once; leaving aborts those under way.

    Raises what the engine raises when it refuses one. Tokens are taken from the engine as they
    come, so a client that reads slowly holds up nobody; a request's tokens are bounded, and so is
    what waits here. Whoever shares the lock `leaving` leaves in turn. `in_time` is open while a
    piece is awaited.
    """
    sender, receiver = trio.open_memory_channel[TextPiece | PipelineError](math.inf)
    scopes: list[trio.CancelScope] = []
    async with open_tasks() as tasks:
        try:
            for choice, generation in enumerate(generations):
                stops = generation.sampling.stop
                text = ChoiceText(choice, tokenizer, generation.prompt_ids, stops, options)
                scope = trio.CancelScope()
                scopes.append(scope)
                await tasks.start(_follow, engine, generation, text, sender, record, choice, scope)
                scope.shield = True  # from now on it is aborted in turn
            yield PieceStream(receiver, len(generations), in_time)
        finally:
            with trio.CancelScope(shield=True):
                await _abort(scopes, leaving)


async def _abort(scopes: Sequence[trio.CancelScope], leaving: trio.Lock) -> None:
    """Cancel them a few at a time.

    Attack: thousands that hang up at once, so that ending them takes all the time there is.
    """
    async with leaving:
        for i, scope in enumerate(scopes):
            if i % _LEAVING_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            scope.cancel()


async def _follow(
    engine: Engine,
    generation: Generation,
    text: ChoiceText,
    sender: trio.MemorySendChannel[TextPiece | PipelineError],
    record: RequestRecord,
    choice: int,
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    with scope:
        async with engine.generate(generation) as outputs:
            task_status.started()
            try:
                async for output in outputs:
                    if output.token_id != NO_TOKEN:
                        record.add_token(choice, output.num_cached)
                    piece = text.push(output)
                    sender.send_nowait(piece)
                    if piece.finish is not None:
                        return
                sender.send_nowait(SessionError("the engine ended a request without a reason"))
            except PipelineError as error:
                sender.send_nowait(error)
