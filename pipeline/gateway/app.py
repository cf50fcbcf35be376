"""The endpoints."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus

import trio
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.engine.generation import Engine, Generation
from pipeline.errors import PromptError
from pipeline.gateway.answers import Answer, Job
from pipeline.gateway.auth import Access
from pipeline.gateway.edge import Edge
from pipeline.gateway.errors import ApiError, invalid, too_long, unknown_model
from pipeline.gateway.formats import ChatFormat, CompletionFormat, Format
from pipeline.gateway.limits import RateLimiter
from pipeline.gateway.metrics import GatewayMetrics, RequestRecord
from pipeline.gateway.overview import Overview, PipelineView
from pipeline.gateway.schemas import ChatRequest, CompletionRequest, parse_untrusted
from pipeline.gateway.settings import GatewayConfig
from pipeline.gateway.text import GatewayTokenizer

# What OpenAI generates after a text when not told.
DEFAULT_COMPLETION_TOKENS = 16

TokenIds = tuple[int, ...]


def build_app(
    config: GatewayConfig,
    engine: Engine,
    tokenizer: GatewayTokenizer,
    registry: CollectorRegistry,
    *,
    metrics: GatewayMetrics | None = None,
    overview: Overview | None = None,
    is_ready: Callable[[], bool] = lambda: True,
) -> Starlette:
    """The ASGI application; must run under trio, behind a server that drops idle connections.

    `registry` is what /metrics shows; the gateway's own `metrics` are added to it, unless given.
    /pipeline shows `overview`, if there is one.
    """
    metrics = metrics or GatewayMetrics(registry)
    gateway = Gateway(config, engine, tokenizer, registry, is_ready)
    watched = [] if overview is None else [_pipeline_route(config, overview, metrics, is_ready)]
    return Starlette(
        routes=[
            Route("/health", gateway.health),
            Route("/readyz", gateway.readyz),
            Route("/metrics", gateway.metrics),
            *watched,
            Route("/v1/models", gateway.models),
            Route("/v1/models/{model:path}", gateway.model),
            Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
            Route("/v1/completions", gateway.completions, methods=["POST"]),
        ],
        middleware=[
            Middleware(
                Edge,
                access=Access(config.api_keys),
                rate=RateLimiter(config.limits.requests_per_minute, trio.current_time),
                limits=config.limits,
                metrics=metrics,
            )
        ],
        exception_handlers={HTTPException: _refuse_route},
    )


class Gateway:
    """What each route does."""

    def __init__(
        self,
        config: GatewayConfig,
        engine: Engine,
        tokenizer: GatewayTokenizer,
        registry: CollectorRegistry,
        is_ready: Callable[[], bool],
    ) -> None:
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._registry = registry
        self._is_ready = is_ready
        self._created = int(time.time())

    async def health(self, _: Request) -> Response:
        """Whether the server runs."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        """Whether requests would be served."""
        if self._is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, HTTPStatus.SERVICE_UNAVAILABLE)

    async def metrics(self, _: Request) -> Response:
        """Prometheus' text format."""
        content = generate_latest(self._registry)
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(self, _: Request) -> Response:
        """The one model there is, as a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """One model."""
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Answer:
        """The next message of a conversation."""
        body = parse_untrusted(ChatRequest, await request.body())
        self._check_common(body)
        if body.max_completion_tokens is None:
            max_tokens = self._max_tokens(body.max_tokens, "max_tokens")
        else:
            max_tokens = self._max_tokens(body.max_completion_tokens, "max_completion_tokens")
        messages = [message.for_template() for message in body.messages]
        render = partial(self._config.chat_template.render, messages)
        prompt_ids = await self._encode(
            lambda: self._tokenizer.encode_rendered(render()), "messages"
        )
        has_logprobs = body.num_logprobs is not None
        return self._answer(
            request,
            body,
            ChatFormat(self._tokenizer, has_logprobs),
            [prompt_ids],
            max_tokens,
            body.num_logprobs,
        )

    async def completions(self, request: Request) -> Answer:
        """What follows a text, or each of several."""
        body = parse_untrusted(CompletionRequest, await request.body())
        self._check_common(body)
        num_each = body.n or 1
        if len(body.prompt) * num_each > self._config.limits.max_choices:
            limit = self._config.limits.max_choices
            raise invalid(f"At most {limit} continuations can be asked for at once.", "n")
        max_tokens = self._max_tokens(body.max_tokens or DEFAULT_COMPLETION_TOKENS, "max_tokens")
        prompts = [await self._prompt_ids(prompt) for prompt in body.prompt]
        echoes = [""] * len(prompts)
        if body.echo:
            echoes = [
                prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
                for prompt in body.prompt
            ]
        format_ = CompletionFormat(
            self._tokenizer,
            body.logprobs is not None,
            [echo for echo in echoes for _ in range(num_each)],
        )
        return self._answer(request, body, format_, prompts, max_tokens, body.logprobs)

    def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        format_: Format,
        prompts: Sequence[TokenIds],
        max_tokens: int,
        logprobs: int | None,
    ) -> Answer:
        record: RequestRecord = request.state.record
        num_prompt = sum(map(len, prompts))
        record.add_prompt(num_prompt)
        ends = frozenset(body.stop_token_ids or ())
        generations = [
            Generation(
                prompt_ids=prompt_ids,
                max_tokens=max_tokens,
                eos_token_ids=ends if body.ignore_eos else ends | self._config.eos_token_ids,
                sampling=body.sampling(choice, logprobs),
                request_id=record.request_id,
            )
            for prompt_ids in prompts
            for choice in range(body.n or 1)
        ]
        job = Job(
            model=self._config.served_model_name,
            format=format_,
            generations=generations,
            num_prompt=num_prompt,
            record=record,
            is_streamed=bool(body.stream),
            includes_usage=body.includes_usage,
        )
        return Answer(job, self._engine, self._tokenizer)

    async def _prompt_ids(self, prompt: str | TokenIds) -> TokenIds:
        if isinstance(prompt, str):
            return await self._encode(partial(self._tokenizer.encode, prompt), "prompt")
        if max(prompt) >= self._tokenizer.vocab_size:
            raise invalid(f"The model has no token {max(prompt)}.", "prompt")
        return self._checked(prompt, "prompt")

    async def _encode(self, encode: Callable[[], TokenIds], param: str) -> TokenIds:
        """Encode in a thread: a long text takes a second, and others' tokens must not wait."""
        try:
            prompt_ids = await trio.to_thread.run_sync(encode, abandon_on_cancel=True)
        except PromptError as error:
            raise invalid(str(error), param) from error
        return self._checked(prompt_ids, param)

    def _checked(self, prompt_ids: TokenIds, param: str) -> TokenIds:
        room = self._engine.max_seq_len
        if len(prompt_ids) >= room:
            raise too_long(len(prompt_ids), room, param)
        return prompt_ids

    def _max_tokens(self, asked: int | None, param: str) -> int:
        room = self._engine.max_seq_len
        if asked is not None and asked > room:
            raise invalid(f"{param} is {asked}; this model's context holds {room} tokens.", param)
        return asked or room

    def _check_common(self, body: ChatRequest | CompletionRequest) -> None:
        self._check_model(body.model)
        for param in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            token_id = max(getattr(body, param) or (), default=0)
            if token_id >= self._tokenizer.vocab_size:
                raise invalid(f"The model has no token {token_id}.", param)

    def _check_model(self, model: str) -> None:
        if model != self._config.served_model_name:
            raise unknown_model(model)

    def _model(self) -> dict[str, object]:
        return {
            "id": self._config.served_model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "veilpipe",
        }


def _pipeline_route(
    config: GatewayConfig,
    overview: Overview,
    metrics: GatewayMetrics,
    is_ready: Callable[[], bool],
) -> Route:
    async def show(_: Request) -> Response:
        view = PipelineView(
            model=config.served_model_name,
            is_ready=is_ready(),
            engine=overview.engine(),
            latency=metrics.recent.view(trio.current_time()),
            stages=overview.stages(),
        )
        return JSONResponse(view.model_dump())

    return Route("/pipeline", show)


async def _refuse_route(_: Request, error: Exception) -> Response:
    """A path or method that does not exist."""
    assert isinstance(error, HTTPException)  # what it is registered for
    refusal = ApiError(error.status_code, HTTPStatus(error.status_code).phrase + ".")
    return JSONResponse(refusal.to_json(), error.status_code, headers=error.headers)
