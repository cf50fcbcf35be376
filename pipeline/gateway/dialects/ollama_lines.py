"""An answer as Ollama's: a line of JSON for each piece, or one for all of it."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import trio

from pipeline.gateway.continuations import TextPiece
from pipeline.gateway.desk import Job
from pipeline.gateway.dialects.blocks import BlockKind, BlockReader, Ended, More
from pipeline.gateway.dialects.telling import Event
from pipeline.gateway.errors import ApiError


def error_line(error: ApiError) -> Event:
    """What is told of an error."""
    return {"error": error.message}


def as_time(when: datetime) -> str:
    """A time in UTC, as it is told."""
    return when.isoformat().replace("+00:00", "Z")


def answer_line(model: str, text: str, *, is_chat: bool, **told: object) -> dict[str, Any]:
    """More of an answer, a chat's message or else a text; `told`: what is told beside it."""
    line: dict[str, Any] = {"model": model, "created_at": as_time(datetime.now(UTC))}
    if is_chat:
        return line | {"message": {"role": "assistant", "content": text, **told}}
    return line | {"response": text, **told}


class OllamaTelling:
    """A chat's message or, unless `is_chat`, a text while it is made."""

    def __init__(self, job: Job, model: str, *, is_chat: bool, shows_thoughts: bool) -> None:
        self._job = job
        self._model = model
        self._is_chat = is_chat
        self._shows_thoughts = shows_thoughts
        self._reader = BlockReader()
        self._said: dict[BlockKind, list[str]] = {BlockKind.TEXT: [], BlockKind.THOUGHT: []}
        self._calls: list[Mapping[str, Any]] = []
        self._reason = "stop"

    def begin(self) -> Iterator[Event]:
        """Nothing: the first line has text."""
        yield from ()

    def more(self, piece: TextPiece) -> Iterator[Event]:
        """Text and thoughts as they come, calls when they are whole."""
        if piece.finish == "length":
            self._reason = "length"
        for change in self._reader.push(piece):
            kind = change.block.kind
            if kind is BlockKind.THOUGHT and not self._shows_thoughts:
                continue
            if isinstance(change, More) and kind is not BlockKind.CALL:
                self._said[kind].append(change.text)
                is_text = kind is BlockKind.TEXT
                parts = (change.text, "") if is_text else ("", change.text)
                yield self._line(*parts, [], is_done=False)
            elif isinstance(change, Ended) and kind is BlockKind.CALL:
                block = change.block
                call = {"function": {"name": block.name, "arguments": block.arguments}}
                self._calls.append(call)
                yield self._line("", "", [call], is_done=False)

    def end(self) -> Iterator[Event]:
        """Why it ended, and what it took."""
        yield self._line("", "", [], is_done=True) | self._figures()

    def fail(self, error: ApiError) -> Iterator[Event]:
        """Why there is no more."""
        yield error_line(error)

    def whole(self) -> Event:
        """All of it in one line."""
        text, thought = ("".join(self._said[kind]) for kind in (BlockKind.TEXT, BlockKind.THOUGHT))
        return self._line(text, thought, self._calls, is_done=True) | self._figures()

    def _line(
        self, text: str, thought: str, calls: list[Mapping[str, Any]], *, is_done: bool
    ) -> dict[str, Any]:
        told: dict[str, object] = {"thinking": thought} if thought else {}
        if calls:
            told["tool_calls"] = calls
        line = answer_line(self._model, text, is_chat=self._is_chat, **told)
        return line | {"done": is_done}

    def _figures(self) -> dict[str, Any]:
        """Durations in nanoseconds."""
        record = self._job.record
        total = int((trio.current_time() - record.started) * 1e9)
        first = total if record.ttft is None else int(record.ttft * 1e9)
        return {
            "done_reason": self._reason,
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_count": self._job.num_prompt,
            "prompt_eval_duration": first,
            "eval_count": record.num_generated,
            "eval_duration": total - first,
        }
