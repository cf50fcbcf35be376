"""The endpoints of other dialects: OpenAI's responses, Anthropic's messages, Ollama's.

Each reads its body into the desk's order and tells of what the desk generates; keys, limits and
records are those of all endpoints.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.gateway.answer_parts import THINK
from pipeline.gateway.desk import Desk, Job
from pipeline.gateway.dialects.messages_events import MessageTelling
from pipeline.gateway.dialects.messages_requests import CountRequest, MessagesRequest
from pipeline.gateway.dialects.ollama_lines import OllamaTelling, answer_line, as_time
from pipeline.gateway.dialects.ollama_requests import (
    LATEST,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from pipeline.gateway.dialects.responses_events import ResponseParts, ResponseTelling
from pipeline.gateway.dialects.responses_requests import ResponsesRequest
from pipeline.gateway.dialects.responses_store import ResponseStore
from pipeline.gateway.errors import invalid
from pipeline.gateway.generation_order import Order
from pipeline.gateway.http.answer_schemas import OtherAnswer
from pipeline.gateway.http.api_route import ApiRoute
from pipeline.gateway.http.client_exchange import Exchange
from pipeline.gateway.http.completion_formats import ChatFormat
from pipeline.gateway.http.openapi import EVENTS
from pipeline.gateway.http.told_answer import LINES, NAMED_EVENTS, ToldAnswer
from pipeline.gateway.openai_requests import parse_untrusted

# Anthropic's, each named after the day of its first use; messages have been as they are since.
_ANTHROPIC_VERSION = "2023-06-01"
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)

_Items = Sequence[Mapping[str, Any]]
_Messages = TypeVar("_Messages", bound=CountRequest)
_Chat = TypeVar("_Chat", OllamaChatRequest, OllamaGenerateRequest)
# Ollama's, of a model's file; there is none here.
_LINES = LINES.media_type.decode()
_DETAILS = {"format": "", "family": "", "parameter_size": "", "quantization_level": ""}


def dialect_routes(desk: Desk) -> Sequence[Route]:
    """All of them."""
    responses, messages, ollama = ResponsesDoor(desk), MessagesDoor(desk), OllamaDoor(desk)
    told = partial(ApiRoute, answer=OtherAnswer)
    post = partial(told, methods=["POST"])
    own = partial(post, error=OtherAnswer)
    return (
        post("/v1/responses", responses.create, body=ResponsesRequest, streams=EVENTS),
        told("/v1/responses/{id}", responses.stored),
        told("/v1/responses/{id}", responses.delete, methods=["DELETE"]),
        own("/v1/messages", messages.create, body=MessagesRequest, streams=EVENTS),
        own("/v1/messages/count_tokens", messages.count, body=CountRequest),
        own("/api/chat", ollama.chat, body=OllamaChatRequest, streams=_LINES),
        own("/api/generate", ollama.generate, body=OllamaGenerateRequest, streams=_LINES),
        own("/api/show", ollama.show, body=OllamaShowRequest),
        told("/api/tags", ollama.tags, error=OtherAnswer),
        told("/api/version", ollama.version, error=OtherAnswer),
    )


class ResponsesDoor:
    """`/v1/responses`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._store = ResponseStore()

    async def create(self, request: Request) -> ToldAnswer:
        """An answer to a conversation, which may be stored. Raises ApiError."""
        exchange: Exchange = request.state.exchange
        caller, config = exchange.caller, self._desk.config

        def read(raw: bytes) -> tuple[ResponsesRequest, _Items, Order]:
            body = parse_untrusted(ResponsesRequest, raw)
            before = self._store.conversation(caller, body.previous_response_id)
            items = (*before, *body.items(self._store.finder(caller)))
            return body, items, body.order(config, items)

        # Always in a thread: what it goes on from may be longer than what it says.
        body, items, order = await trio.to_thread.run_sync(read, exchange.body)
        job = await _prepared(self._desk, order, exchange)
        logprob = ChatFormat(self._desk.tokenizer, has_logprobs=True).logprob
        parts = ResponseParts(
            body,
            job,
            config.served_model_name,
            logprob=None if body.num_logprobs is None else logprob,
            keep=None if body.store is False else partial(self._store.put, caller, items),
        )
        return ToldAnswer(
            self._desk, job, ResponseTelling(parts), NAMED_EVENTS if body.stream else None
        )

    async def stored(self, request: Request) -> Response:
        """One of the caller's. Raises ApiError."""
        found = self._store.get(request.state.exchange.caller, request.path_params["id"])
        return Response(found.response, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        """Forget one of the caller's. Raises ApiError."""
        its_id = request.path_params["id"]
        self._store.delete(request.state.exchange.caller, its_id)
        return JSONResponse({"id": its_id, "object": "response", "deleted": True})


class MessagesDoor:
    """`/v1/messages`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def create(self, request: Request) -> ToldAnswer:
        """The next message of a conversation. Raises ApiError."""
        body, order = await self._read(MessagesRequest, request)
        job = await _prepared(self._desk, order, request.state.exchange)
        telling = MessageTelling(
            job, self._desk.config.served_model_name, shows_thoughts=body.shows_thoughts
        )
        return ToldAnswer(self._desk, job, telling, NAMED_EVENTS if body.stream else None)

    async def count(self, request: Request) -> Response:
        """The tokens of a conversation. Raises ApiError."""
        _, order = await self._read(CountRequest, request)
        return JSONResponse(
            {"input_tokens": len(await self._desk.encode(order, request.state.exchange.record))}
        )

    async def _read(self, schema: type[_Messages], request: Request) -> tuple[_Messages, Order]:
        """The body, and what it asks for. Raises ApiError."""
        said = request.headers.get("anthropic-version", _ANTHROPIC_VERSION)
        if not _DAY.fullmatch(said) or said < _ANTHROPIC_VERSION:
            name = "anthropic-version"
            raise invalid(f"{name}: give {_ANTHROPIC_VERSION}, or a later one.", name)
        exchange: Exchange = request.state.exchange

        def read(raw: bytes) -> tuple[_Messages, Order]:
            body = parse_untrusted(schema, raw)
            return body, body.order(self._desk.config)

        return await exchange.understand(read)


class OllamaDoor:
    """`/api`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def chat(self, request: Request) -> Response | ToldAnswer:
        """The next message of a conversation. Raises ApiError."""
        return await self._answer(OllamaChatRequest, request)

    async def generate(self, request: Request) -> Response | ToldAnswer:
        """What answers a prompt. Raises ApiError."""
        return await self._answer(OllamaGenerateRequest, request)

    async def tags(self, _: Request) -> Response:
        """The one model there is, as a list."""
        name = self._desk.config.served_model_name
        created = datetime.fromtimestamp(self._desk.created, UTC)
        model = {"name": name, "model": name, "modified_at": as_time(created)}
        return JSONResponse({"models": [{**model, "size": 0, "digest": "", "details": _DETAILS}]})

    async def show(self, request: Request) -> Response:
        """What is known of the model. Raises ApiError if it is another."""
        exchange: Exchange = request.state.exchange
        body = parse_untrusted(OllamaShowRequest, exchange.body)
        self._desk.check_model((body.model or body.name or "").removesuffix(LATEST))
        template = self._desk.config.chat_template.source
        thinks = ["thinking"] if THINK in template else []
        return JSONResponse(
            {
                "template": template,
                "details": _DETAILS,
                "model_info": {"general.context_length": self._desk.max_seq_len},
                "capabilities": ["completion", "tools", *thinks],
            }
        )

    async def version(self, _: Request) -> Response:
        """Of this software."""
        return JSONResponse({"version": version("veilpipe")})

    async def _answer(self, schema: type[_Chat], request: Request) -> Response | ToldAnswer:
        exchange: Exchange = request.state.exchange

        def read(raw: bytes) -> tuple[_Chat, Order]:
            body = parse_untrusted(schema, raw)
            return body, body.order(self._desk.config)

        body, order = await exchange.understand(read)
        if body.asks_nothing:
            self._desk.check_model(order.model or "")
            line = answer_line(body.model, "", is_chat=schema.is_chat)
            return JSONResponse({**line, "done": True, "done_reason": "load"})
        job = await _prepared(self._desk, order, exchange)
        telling = OllamaTelling(
            job, body.model, is_chat=schema.is_chat, shows_thoughts=body.shows_thoughts
        )
        return ToldAnswer(self._desk, job, telling, None if body.stream is False else LINES)


async def _prepared(desk: Desk, order: Order, exchange: Exchange) -> Job:
    job = await desk.prepare(order, exchange.record, exchange.caller)
    exchange.forget_body()  # what it said has become token ids
    return job
