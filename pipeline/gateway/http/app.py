"""The endpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from typing import TypeVar

import trio
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.gateway.desk import Desk, Job
from pipeline.gateway.errors import ApiError, Kind
from pipeline.gateway.generation_order import Order
from pipeline.gateway.http.answer_schemas import (
    Alive,
    ChatCompletion,
    Completion,
    Health,
    Model,
    Models,
    Version,
)
from pipeline.gateway.http.api_route import ApiRoute
from pipeline.gateway.http.client_exchange import Exchange
from pipeline.gateway.http.completion_formats import (
    ChatFormat,
    CompletionFormat,
    told_prompt,
)
from pipeline.gateway.http.counters import HttpMetrics
from pipeline.gateway.http.dialects import dialect_routes
from pipeline.gateway.http.errors import to_response
from pipeline.gateway.http.evaluation import evaluation_routes
from pipeline.gateway.http.middleware import Edge
from pipeline.gateway.http.openapi import EVENTS, docs_routes
from pipeline.gateway.http.prompt_formats import Echo, PromptLogprobs
from pipeline.gateway.http.responses import Answer, Wanted
from pipeline.gateway.openai_requests import ChatRequest, CompletionRequest, parse_untrusted
from pipeline.gateway.pipeline_status import Overview, PipelineView
from pipeline.gateway.readiness import READY, Readiness

_Body = TypeVar("_Body", ChatRequest, CompletionRequest)


def build_app(
    desk: Desk,
    registry: CollectorRegistry,
    *,
    metrics: HttpMetrics | None = None,
    overview: Overview | None = None,
    readiness: Callable[[], Readiness] = lambda: READY,
    more: Sequence[Route] = (),
    page: Sequence[Route] = (),
) -> Starlette:
    """The ASGI application; must run under trio, behind a server that drops idle connections.

    `registry` is what /metrics shows; the door's own `metrics` are added to it, unless given.
    /pipeline shows `overview`, if there is one. `more`: endpoints of others, each of which finds
    the body in its request's exchange. `page`: what anybody may read.
    """
    metrics = metrics or HttpMetrics(registry)
    more = (*more, *dialect_routes(desk), *evaluation_routes(desk))
    door = Door(desk, registry, readiness)
    watched = [] if overview is None else [_pipeline_route(desk, overview, readiness)]
    routes = [*door.routes(), *watched, *more]
    page = (*page, *docs_routes(routes))
    return Starlette(
        routes=[*routes, *page],
        middleware=[
            *_cors(desk.config.cors_origins),
            Middleware(
                Edge,
                desk=desk,
                metrics=metrics,
                more=frozenset(route.path for route in more),
                page=frozenset(route.path for route in page),
            ),
        ],
        exception_handlers={HTTPException: _refuse_route},
    )


class Door:
    """What each route does."""

    def __init__(
        self, desk: Desk, registry: CollectorRegistry, readiness: Callable[[], Readiness]
    ) -> None:
        self._desk = desk
        self._registry = registry
        self._readiness = readiness

    def routes(self) -> Sequence[Route]:
        """All of them."""
        post = ["POST"]
        return (
            ApiRoute("/livez", self.livez, answer=Alive, is_open=True),
            ApiRoute("/health", self.health, answer=Health, is_open=True),
            ApiRoute("/readyz", self.health, answer=Health, is_open=True),
            ApiRoute("/metrics", self.metrics),
            ApiRoute("/version", self.version, answer=Version),
            ApiRoute("/v1/models", self.models, answer=Models),
            ApiRoute("/v1/models/{model:path}", self.model, answer=Model),
            ApiRoute(
                "/v1/chat/completions", self.chat, methods=post, body=ChatRequest,
                answer=ChatCompletion, streams=EVENTS,
            ),
            ApiRoute(
                "/v1/completions", self.completions, methods=post, body=CompletionRequest,
                answer=Completion, streams=EVENTS,
            ),
        )  # fmt: skip

    async def livez(self, _: Request) -> Response:
        """Whether the server runs: starting it again would help with nothing else."""
        return JSONResponse({"status": "ok"})

    async def health(self, _: Request) -> Response:
        """Whether a token could be computed now, and what is awaited for that."""
        found = self._readiness()
        awaited = [_known(asdict(each)) for each in found.awaited]
        status = HTTPStatus.OK if found.is_ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"status": found.phase, "awaited": awaited}, status)

    async def metrics(self, _: Request) -> Response:
        """Prometheus' text format."""
        content = generate_latest(self._registry)
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})

    async def version(self, _: Request) -> Response:
        """Of this software."""
        return JSONResponse({"version": version("veilpipe")})

    async def models(self, _: Request) -> Response:
        """The one model there is, as a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """One model. Raises ApiError if it is another."""
        self._desk.check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Answer:
        """The next message of a conversation. Raises ApiError."""
        body, order = await self._read(ChatRequest, request)
        job = await self._prepare(order, request)
        tokenizer = self._desk.tokenizer
        format_ = ChatFormat(
            tokenizer,
            body.num_logprobs is not None,
            shows_reasoning=body.include_reasoning is not False,
        )
        more = None
        if body.prompt_logprobs is not None:
            told = PromptLogprobs.of(job.generations[0], body.prompt_logprobs)
            more = partial(told_prompt, told, tokenizer)
        wanted = Wanted(format_, bool(body.stream), body.includes_usage, more=more)
        return Answer(self._desk, job, wanted)

    async def completions(self, request: Request) -> Answer:
        """What follows a text, or each of several. Raises ApiError."""
        body, order = await self._read(CompletionRequest, request)
        job = await self._prepare(order, request)
        tokenizer, num_top = self._desk.tokenizer, body.prompt_logprobs
        echoes = [Echo()] * len(job.generations)
        if body.echo:
            is_whole = order.truncates_to is None
            texts = [
                prompt if isinstance(prompt, str) and is_whole else tokenizer.decode(ids)
                for prompt, ids in zip(body.prompt, job.prompts, strict=True)
                for _ in order.sampling
            ]
            echoes = [
                Echo.of(each, text, has_logprobs=body.logprobs is not None)
                for each, text in zip(job.generations, texts, strict=True)
            ]
        told = [] if num_top is None else [PromptLogprobs.of(g, num_top) for g in job.generations]
        format_ = CompletionFormat(tokenizer, body.logprobs, echoes, told)
        wanted = Wanted(format_, bool(body.stream), body.includes_usage, format_.echoed)
        return Answer(self._desk, job, wanted)

    async def _read(self, schema: type[_Body], request: Request) -> tuple[_Body, Order]:
        """The body, and what it asks for. Raises ApiError."""
        exchange: Exchange = request.state.exchange

        def parse(raw: bytes) -> tuple[_Body, Order]:
            body = parse_untrusted(schema, raw)
            return body, body.order(self._desk.config.sampling_defaults)

        return await exchange.understand(parse)

    async def _prepare(self, order: Order, request: Request) -> Job:
        exchange: Exchange = request.state.exchange
        job = await self._desk.prepare(order, exchange.record, exchange.caller)
        exchange.forget_body()  # what it said has become token ids
        return job

    def _model(self) -> dict[str, object]:
        return {
            "id": self._desk.config.served_model_name,
            "object": "model",
            "created": self._desk.created,
            "owned_by": "veilpipe",
        }


def _known(fields: Mapping[str, object]) -> Mapping[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Lets pages of these origins ask: browsers ask first whether they may, and without a key."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    ]


def _pipeline_route(desk: Desk, overview: Overview, readiness: Callable[[], Readiness]) -> Route:
    async def show(_: Request) -> Response:
        """How the pipelines stand: engines, latencies, and stages."""
        view = PipelineView(
            model=desk.config.served_model_name,
            is_ready=readiness().is_ready,
            engine=overview.engine(),
            latency=desk.metrics.recent.view(trio.current_time()),
            replicas=overview.replicas(),
            stages=overview.stages(),
        )
        return JSONResponse(view.model_dump())

    return ApiRoute("/pipeline", show, answer=PipelineView)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """A path or method that does not exist."""
    assert isinstance(error, HTTPException)  # what it is registered for
    is_there = error.status_code == HTTPStatus.METHOD_NOT_ALLOWED
    kind = Kind.NOT_ALLOWED if is_there else Kind.NOT_FOUND
    refusal = ApiError(kind, f"{HTTPStatus(error.status_code).phrase}.")
    return to_response(refusal, request.url.path, error.headers)
