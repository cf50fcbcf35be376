"""An answer as Anthropic's message: its blocks, and the events that tell of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.gateway.continuations import TextPiece
from pipeline.gateway.desk import Job
from pipeline.gateway.dialects.blocks import (
    Begun,
    Block,
    BlockKind,
    BlockReader,
    Change,
    Ended,
    More,
)
from pipeline.gateway.dialects.telling import Event
from pipeline.gateway.errors import ApiError, Kind

# By OpenAI's name of why an answer ended.
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS = {
    BlockKind.THOUGHT: ("thinking_delta", "thinking"),
    BlockKind.TEXT: ("text_delta", "text"),
    BlockKind.CALL: ("input_json_delta", "partial_json"),
}
_ERROR_TYPES: Mapping[Kind, str] = {
    Kind.INVALID: "invalid_request_error",
    Kind.NO_KEY: "authentication_error",
    Kind.FORBIDDEN: "permission_error",
    Kind.NOT_FOUND: "not_found_error",
    Kind.NOT_ALLOWED: "invalid_request_error",
    Kind.IN_USE: "conflict_error",
    Kind.TOO_SLOW: "timeout_error",
    Kind.TOO_LARGE: "request_too_large",
    Kind.TOO_MANY: "rate_limit_error",
    Kind.BUSY: "overloaded_error",
    Kind.UNAVAILABLE: "overloaded_error",
    Kind.FAILED: "api_error",
}


def error_event(error: ApiError) -> Event:
    """What is told of an error."""
    told = {"type": _ERROR_TYPES[error.kind], "message": error.message}
    return {"type": "error", "error": told}


class MessageTelling:
    """A message while it is made."""

    def __init__(self, job: Job, model: str, *, shows_thoughts: bool) -> None:
        self._job = job
        self._model = model
        self._shows_thoughts = shows_thoughts
        self._reader = BlockReader()
        # Blocks that are told of, by their place in the answer.
        self._places: dict[int, int] = {}
        self._content: list[Mapping[str, Any]] = []
        self._reason: str | None = None
        self._stop: str | None = None

    def begin(self) -> Iterator[Event]:
        """The message without content."""
        yield {"type": "message_start", "message": self.whole()}

    def more(self, piece: TextPiece) -> Iterator[Event]:
        """Blocks and deltas."""
        if piece.finish is not None:
            is_stopped = piece.stop is not None and piece.finish == "stop"
            self._reason = "stop_sequence" if is_stopped else _REASONS[piece.finish]
            self._stop = piece.stop if is_stopped else None
        for change in self._reader.push(piece):
            if change.block.kind is not BlockKind.THOUGHT or self._shows_thoughts:
                yield from self._told(change)

    def end(self) -> Iterator[Event]:
        """Why it ended, and what it took."""
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop}
        yield {"type": "message_delta", "delta": delta, "usage": self._usage()}
        yield {"type": "message_stop"}

    def fail(self, error: ApiError) -> Iterator[Event]:
        """Why there is no more."""
        yield error_event(error)

    def whole(self) -> Event:
        """The message so far."""
        return {
            "id": f"msg_{self._job.record.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": self._content,
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": self._usage(),
        }

    def _told(self, change: Change) -> Iterator[Event]:
        block = change.block
        place = {"index": self._places.setdefault(block.index, len(self._places))}
        if isinstance(change, Begun):
            begun = self._block(block)
            yield {"type": "content_block_start", **place, "content_block": begun}
        elif isinstance(change, More):
            kind, name = _DELTAS[block.kind]
            delta = {"type": kind, name: change.text}
            yield {"type": "content_block_delta", **place, "delta": delta}
        else:
            yield from self._told_end(change, place)

    def _told_end(self, change: Ended, place: Mapping[str, int]) -> Iterator[Event]:
        whole = self._block(change.block)
        self._content.append(whole)
        if change.block.kind is BlockKind.THOUGHT:
            # Clients take a thought without one for unfinished, and do not send it back.
            whole["signature"] = self._job.record.request_id
            delta = {"type": "signature_delta", "signature": whole["signature"]}
            yield {"type": "content_block_delta", **place, "delta": delta}
        yield {"type": "content_block_stop", **place}

    @staticmethod
    def _block(block: Block) -> dict[str, Any]:
        if block.kind is BlockKind.THOUGHT:
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        if block.kind is BlockKind.TEXT:
            return {"type": "text", "text": block.text}
        called = {"name": block.name, "input": block.arguments}
        return {"type": "tool_use", "id": block.call_id, **called}

    def _usage(self) -> Mapping[str, int]:
        """Tokens so far; those of the prompt that were there are told apart from the others."""
        num_cached = self._job.num_cached
        return {
            "input_tokens": self._job.num_prompt - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": self._job.record.num_generated,
        }
