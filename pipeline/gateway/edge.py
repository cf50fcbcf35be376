"""What happens to every request before and around its endpoint."""

import logging
from collections.abc import Callable, Mapping

import trio
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import PipelineError
from pipeline.gateway.auth import Access
from pipeline.gateway.errors import ApiError, from_pipeline, internal
from pipeline.gateway.limits import GatewayLimits, RateLimiter
from pipeline.gateway.metrics import GatewayMetrics, RequestRecord

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/readyz"})
# For whoever watches: as often as they like, so that watching costs no user a request.
WATCH_PATHS = frozenset({"/metrics", "/pipeline"})
_ROUTES = OPEN_PATHS | WATCH_PATHS | {"/v1/models", "/v1/chat/completions", "/v1/completions"}
# A client that sends a body reads the answer afterwards; closing before resets its connection.
_DRAIN_SECONDS = 1.0


class Edge:
    """ASGI middleware: access, rate, body, disconnects, errors, and one log line a request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        rate: RateLimiter,
        limits: GatewayLimits,
        metrics: GatewayMetrics,
    ) -> None:
        self._app = app
        self._access = access
        self._rate = rate
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return
        route = _route(scope["path"])
        # Probes come every few seconds and say nothing new.
        level = logging.DEBUG if route in OPEN_PATHS | WATCH_PATHS else logging.INFO
        record = RequestRecord(self._metrics, route, level)
        scope.setdefault("state", {})["record"] = record
        exchange = _Exchange(receive, send, record)
        with self._metrics.active.track_inprogress():
            try:
                await self._serve(scope, exchange)
            finally:
                record.close()

    async def _serve(self, scope: Scope, exchange: "_Exchange") -> None:
        app = self._app
        try:
            if scope["path"] not in OPEN_PATHS:
                self._access.check(_headers(scope))
                if scope["path"] not in WATCH_PATHS:
                    self._rate.admit()
            await self._read_body(exchange)
        except ApiError as error:
            await exchange.drain()
            app = _response(error)
        if exchange.is_gone:
            exchange.record.is_disconnected = True
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.watch, nursery.cancel_scope.cancel)
            await self._answer(app, scope, exchange)
            nursery.cancel_scope.cancel()

    async def _read_body(self, exchange: "_Exchange") -> None:
        with trio.move_on_after(self._limits.body_seconds):
            await exchange.read_body(self._limits.max_body_bytes)
            return
        raise ApiError(408, "The request's body did not arrive in time.", code="request_timeout")

    async def _answer(self, app: ASGIApp, scope: Scope, exchange: "_Exchange") -> None:
        try:
            await app(scope, exchange.receive, exchange.send)
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
            await _response(failure)(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request's two directions, as the endpoint sees them."""

    def __init__(self, receive: Receive, send: Send, record: RequestRecord) -> None:
        self.record = record
        self.is_started = False
        self.is_gone = False
        self._is_finished = False
        self._is_read = False
        self._body = b""
        self._receive = receive
        self._send = send

    async def read_body(self, max_bytes: int) -> None:
        """Take in the whole body. Raises ApiError if it exceeds `max_bytes`."""
        chunks: list[bytes] = []
        num_bytes = 0
        while not self._is_read and not self.is_gone:
            chunk = await self._next_chunk()
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise ApiError(
                    413,
                    f"The request's body is larger than {max_bytes} bytes.",
                    code="request_too_large",
                )
            chunks.append(chunk)
        self._body = b"".join(chunks)

    async def drain(self) -> None:
        """Discard what is left of the body, for a moment."""
        with trio.move_on_after(_DRAIN_SECONDS):
            while not self._is_read and not self.is_gone:
                await self._next_chunk()

    async def _next_chunk(self) -> bytes:
        message = await self._receive()
        self.is_gone = message["type"] == "http.disconnect"
        self._is_read = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk

    async def watch(self, cancel: Callable[[], None]) -> None:
        """Wait for the client to leave; unless it has its answer, `cancel`.

        Reads on until then, since the server stalls a connection whose events nobody takes.
        """
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._is_finished:
            self.record.is_disconnected = True
            cancel()

    async def receive(self) -> Message:
        """The body, at once; a disconnect cancels the endpoint rather than telling it."""
        body, self._body = self._body, b""
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Pass a message on; the server reports every finished response as a disconnect."""
        if message["type"] == "http.response.start":
            self.is_started = True
            self.record.status = message["status"]
            request_id = (b"x-request-id", self.record.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), request_id]}
        elif not message.get("more_body", False):
            self._is_finished = True
        await self._send(message)


def _response(error: ApiError) -> ASGIApp:
    return JSONResponse(error.to_json(), status_code=error.status, headers=error.headers)


def _route(path: str) -> str:
    """A label from a small set: clients choose paths, and metrics keep every label for ever."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{id}"
    return path if path in _ROUTES else "other"


def _headers(scope: Scope) -> Mapping[bytes, bytes]:
    return dict(scope["headers"])


def _kinds(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "+".join(sorted({_kinds(part) for part in error.exceptions}))
    return type(error).__name__
