"""An answer as OpenAI's response: its items, and the events that tell of them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.gateway.continuations import PlacedToken, TextPiece
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
from pipeline.gateway.dialects.responses_requests import ResponsesRequest
from pipeline.gateway.dialects.telling import Event
from pipeline.gateway.errors import ApiError

_ITEM_PREFIXES = {BlockKind.THOUGHT: "rs", BlockKind.TEXT: "msg", BlockKind.CALL: "fc"}
_PART_KINDS = {BlockKind.THOUGHT: "reasoning_text", BlockKind.TEXT: "output_text"}


@dataclass(frozen=True, slots=True)
class ResponseParts:
    """What a response is told with.

    `logprob`: how one token is told of, where logprobs are asked for. `keep`: takes the response
    that has ended, where it is to be stored.
    """

    request: ResponsesRequest
    job: Job
    model: str
    logprob: Callable[[PlacedToken], Mapping[str, Any]] | None = None
    keep: Callable[[Event], None] | None = None


class ResponseTelling:
    """A response while it is made."""

    def __init__(self, parts: ResponseParts) -> None:
        self._parts = parts
        self._reader = BlockReader()
        self._num_events = 0
        self._finish: str | None = None
        self._response = self._begun()

    def begin(self) -> Iterator[Event]:
        """The response as it was asked for."""
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)

    def more(self, piece: TextPiece) -> Iterator[Event]:
        """Items, parts and deltas."""
        self._finish = piece.finish
        for change in self._reader.push(piece):
            yield from self._told(change)

    def end(self) -> Iterator[Event]:
        """The whole response."""
        is_cut = self._finish == "length"
        reason = {"reason": "max_output_tokens"} if is_cut else None
        status = "incomplete" if is_cut else "completed"
        self._end(status, incomplete_details=reason)
        if self._parts.keep is not None:
            self._parts.keep(self._response)
        yield self._event(f"response.{status}", response=self._response)

    def fail(self, error: ApiError) -> Iterator[Event]:
        """The response as far as it has come, and why no further."""
        # The service's own codes, of which clients know no others.
        self._end("failed", error={"code": "server_error", "message": error.message})
        yield self._event("response.failed", response=self._response)

    def whole(self) -> Event:
        """The response."""
        return self._response

    def _begun(self) -> dict[str, Any]:
        request, job = self._parts.request, self._parts.job
        sampling = job.generations[0].sampling
        return {
            "id": f"resp_{job.record.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._parts.model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None, **(request.reasoning or {})},
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}, **(request.text or {})},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None,
        }

    def _end(self, status: str, **fields: object) -> None:
        job = self._parts.job
        num_prompt, num_generated = job.num_prompt, job.record.num_generated
        self._response |= fields
        self._response["status"] = status
        self._response["completed_at"] = int(time.time()) if status == "completed" else None
        self._response["usage"] = {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": job.num_cached, "cache_write_tokens": 0},
            "output_tokens": num_generated,
            "output_tokens_details": {"reasoning_tokens": self._reader.num_thought},
            "total_tokens": num_prompt + num_generated,
        }

    def _told(self, change: Change) -> Iterator[Event]:
        place = {"output_index": change.block.index}
        if isinstance(change, Begun):
            item = self._item(change.block, "in_progress")
            yield self._event("response.output_item.added", **place, item=item)
            if change.block.kind is not BlockKind.CALL:
                part = self._content(change.block)
                yield self._event("response.content_part.added", **self._place(change), part=part)
        elif isinstance(change, More):
            yield from self._told_more(change)
        else:
            yield from self._told_end(change)
            item = self._item(change.block, "incomplete" if change.is_cut else "completed")
            self._response["output"].append(item)
            yield self._event("response.output_item.done", **place, item=item)

    def _told_more(self, change: More) -> Iterator[Event]:
        place = self._place(change)
        if change.block.kind is BlockKind.CALL:
            kind = "response.function_call_arguments.delta"
            yield self._event(kind, **place, delta=change.text)
            return
        if change.block.kind is BlockKind.TEXT:
            place["logprobs"] = self._logprobs(change.tokens)
        kind = f"response.{_PART_KINDS[change.block.kind]}.delta"
        yield self._event(kind, **place, delta=change.text)

    def _told_end(self, change: Ended) -> Iterator[Event]:
        block, place = change.block, self._place(change)
        if block.kind is BlockKind.CALL:
            kind = "response.function_call_arguments.done"
            yield self._event(kind, **place, name=block.name, arguments=block.text)
            return
        part = self._content(block)
        more = {"logprobs": part["logprobs"]} if block.kind is BlockKind.TEXT else {}
        kind = f"response.{_PART_KINDS[block.kind]}.done"
        yield self._event(kind, **place, text=part["text"], **more)
        yield self._event("response.content_part.done", **place, part=part)

    def _place(self, change: Change) -> dict[str, Any]:
        block = change.block
        place = {"item_id": self._item_id(block), "output_index": block.index}
        return place if block.kind is BlockKind.CALL else {**place, "content_index": 0}

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        content = [] if status == "in_progress" else [self._content(block)]
        if block.kind is BlockKind.THOUGHT:
            return item | {"type": "reasoning", "summary": [], "content": content}
        if block.kind is BlockKind.TEXT:
            return item | {"type": "message", "role": "assistant", "content": content}
        called = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
        return item | {"type": "function_call", **called}

    def _content(self, block: Block) -> dict[str, Any]:
        part: dict[str, Any] = {"type": _PART_KINDS.get(block.kind, ""), "text": block.text}
        if block.kind is BlockKind.TEXT:
            part |= {"annotations": [], "logprobs": self._logprobs(block.tokens)}
        return part

    def _item_id(self, block: Block) -> str:
        return f"{_ITEM_PREFIXES[block.kind]}_{self._parts.job.record.request_id}_{block.index}"

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> list[Mapping[str, Any]]:
        if self._parts.logprob is None:
            return []
        return [self._parts.logprob(each) for each in tokens]

    def _event(self, kind: str, **fields: object) -> Event:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event
