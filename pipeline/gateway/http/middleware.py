"""What happens to every request before and around its endpoint."""

import logging
from collections.abc import Mapping

import trio
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.errors import PipelineError
from pipeline.gateway.desk import Desk
from pipeline.gateway.errors import ApiError, Kind, from_pipeline, internal
from pipeline.gateway.http.access import Access
from pipeline.gateway.http.client_exchange import BodyBudget, Exchange
from pipeline.gateway.http.counters import HttpMetrics
from pipeline.gateway.http.errors import to_response

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/livez", "/health", "/readyz"})
# For whoever watches: as often as they like, so that watching costs no user a request.
WATCH_PATHS = frozenset({"/metrics", "/pipeline"})
# The ones that read what is sent to them, beside those that `Edge` is told of.
_VERSIONS = frozenset({"1.0", "1.1", "2", "3"})
_BODY_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
# Whose children are told apart by an id.
_PARENTS = ("/v1/models", "/v1/responses")
_ROUTES = OPEN_PATHS | WATCH_PATHS | {"/version", "/v1/models"}


class Edge:
    """ASGI middleware: access, rate, body, disconnects, errors, and one log line a request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        desk: Desk,
        metrics: HttpMetrics,
        more: frozenset[str] = frozenset(),
        page: frozenset[str] = frozenset(),
    ) -> None:
        """`more`: further paths that read what is sent to them; `page`: what anybody may read."""
        self._app = app
        self._body_paths = _BODY_PATHS | more
        self._page_paths = page
        self._desk = desk
        self._limits = desk.config.limits
        self._access = Access(desk.keys)
        self._budget = BodyBudget(max(self._limits.max_buffered_bytes, self._limits.max_body_bytes))
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return
        if scope.get("http_version", "1.1") not in _VERSIONS:
            await Response(status_code=400)(scope, receive, send)
            return
        route = self._route(scope["path"])
        # Probes come every few seconds and say nothing new.
        level = logging.DEBUG if route in OPEN_PATHS | WATCH_PATHS else logging.INFO
        with self._metrics.active.track_inprogress(), self._desk.request(route) as record:
            exchange = Exchange(receive, send, record, self._budget)
            scope.setdefault("state", {})["exchange"] = exchange
            try:
                await self._serve(scope, exchange)
            finally:
                exchange.forget_body()
                if exchange.is_gone or exchange.is_disconnected:
                    record.status = 499
                self._metrics.requests.labels(route, str(record.status)).inc()
                record.log(level)

    def _route(self, path: str) -> str:
        """A label from a small set: clients choose paths, and metrics keep every label for ever."""
        for parent in _PARENTS:
            if path.startswith(f"{parent}/"):
                return f"{parent}/{{id}}"
        if path in self._page_paths:
            return "/"
        return path if path in _ROUTES | self._body_paths else "other"

    async def _serve(self, scope: Scope, exchange: Exchange) -> None:
        max_bytes = self._limits.max_body_bytes
        try:
            self._admit(scope, exchange)
            if scope["method"] == "POST" and scope["path"] in self._body_paths:
                await self._read_body(exchange, _headers(scope))
            else:
                await exchange.drain(max_bytes)
        except ApiError as error:
            await exchange.refuse(error, scope, max_bytes)
            return
        if exchange.is_gone:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.watch, nursery.cancel_scope.cancel)
            await self._answer(scope, exchange)
            nursery.cancel_scope.cancel()

    def _admit(self, scope: Scope, exchange: Exchange) -> None:
        if scope["path"] in OPEN_PATHS | self._page_paths:
            return
        exchange.caller = self._access.check(_headers(scope))
        if scope["path"] not in WATCH_PATHS:
            self._desk.count_request()

    async def _read_body(self, exchange: Exchange, headers: Mapping[bytes, bytes]) -> None:
        declared_bytes = int(headers.get(b"content-length", 0))  # the server has checked it
        with trio.move_on_after(self._limits.body_seconds):
            await exchange.read_body(self._limits.max_body_bytes, declared_bytes)
            return
        raise ApiError(
            Kind.TOO_SLOW, "The request's body did not arrive in time.", code="request_timeout"
        )

    async def _answer(self, scope: Scope, exchange: Exchange) -> None:
        try:
            await self._app(scope, exchange.receive, exchange.send)
            return
        except ApiError as error:
            failure = error
        except PipelineError as error:
            failure = from_pipeline(error)
        except Exception as error:
            # Its text may quote content, so only its kind is logged.
            logger.error(
                "event=defect request_id=%s error=%s",
                exchange.record.request_id,
                _kinds(error),
            )
            failure = internal()
        if not exchange.is_started:
            await to_response(failure, scope["path"])(scope, exchange.receive, exchange.send)


def _headers(scope: Scope) -> Mapping[bytes, bytes]:
    return dict(scope["headers"])


def _kinds(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "+".join(sorted({_kinds(part) for part in error.exceptions}))
    return type(error).__name__
