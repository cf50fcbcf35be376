"""Listens, and serves each connection apart from the others."""

import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ASGIFramework
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from pipeline.errors import InputError
from pipeline.gateway.auth import is_local_name
from pipeline.gateway.desk import Desk
from pipeline.gateway.http.app import build_app
from pipeline.gateway.http.counters import HttpMetrics
from pipeline.gateway.http.hypercorn_connection import ClientConnection, ClientStream
from pipeline.gateway.pipeline_status import Overview
from pipeline.gateway.readiness import READY, Readiness
from pipeline.gateway.settings import GatewayConfig

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_MAX_HEADER_BYTES = 32 << 10
_REFUSE_SECONDS = 0.5
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
)
_BUSY_BODY = (
    b'{"error":{"message":"Too many connections are open; try again.",'
    b'"type":"server_error","param":null,"code":"too_many_connections"}}'
)


async def serve(
    desk: Desk,
    registry: CollectorRegistry,
    *,
    listeners: Sequence[trio.SocketListener] = (),
    overview: Overview | None = None,
    readiness: Callable[[], Readiness] = lambda: READY,
    more: Sequence[Route] = (),
    page: Sequence[Route] = (),
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; reports the base URL once it listens.

    `registry` and `overview` are shown by /metrics, the latter by /pipeline as well; `listeners`
    are those of `listen`, if that has been done; `more` and `page` are endpoints as `build_app`
    takes them.

    Raises InputError if the address cannot be had, or is open to others and no key is set.
    """
    config = desk.config
    listeners = listeners or await listen(config)
    url = _url(listeners[0], is_secure=config.tls is not None)
    if config.tls is None and not is_local_name(_host(listeners[0])):
        logger.warning(
            "event=plain_http url=%s detail=%r",
            url,
            "OTHERS ON THE NETWORK CAN READ every prompt, answer and API key: give --tls-cert and "
            "--tls-key, or listen on 127.0.0.1",
        )
    metrics = HttpMetrics(registry)
    if overview is not None:
        registry.register(overview)
    app = build_app(
        desk,
        registry,
        metrics=metrics,
        overview=overview,
        readiness=readiness,
        more=more,
        page=page,
    )
    server = _Server(ASGIWrapper(cast(ASGIFramework, app)), config, metrics)
    logger.info("event=gateway_started url=%s keys=%d", url, len(config.api_keys))
    task_status.started(url)
    await trio.serve_listeners(server.handle, list(listeners))


class _Server:
    """What connections share: the application, and a limit on how many there are."""

    def __init__(self, app: AppWrapper, config: GatewayConfig, metrics: HttpMetrics) -> None:
        self._app = app
        self._limits = config.limits
        self._tls = config.tls
        self._metrics = metrics
        self._leaving = trio.Lock()
        self._num_open = 0
        self._context = WorkerContext(None)
        self._config = Config()
        self._config.errorlog = None  # its tracebacks may quote content; the edge logs requests
        self._config.accesslog = None
        self._config.keep_alive_timeout = config.limits.header_seconds
        self._config.h11_max_incomplete_size = _MAX_HEADER_BYTES
        self._config.include_server_header = False

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one connection; nothing it does reaches another."""
        if self._num_open >= self._limits.max_connections:
            self._metrics.refused.inc()
            if self._tls is None:
                await _refuse(stream)
            else:
                await trio.aclose_forcefully(stream)  # not even its handshake is worth it
            return
        self._num_open += 1
        self._metrics.connections.inc()
        try:
            secured = await self._secure(stream)
            if secured is not None:
                await ClientConnection(
                    self._app,
                    self._config,
                    self._context,
                    secured,
                    self._limits.write_seconds,
                    self._leaving,
                ).run()
        except Exception as error:
            logger.error("event=connection_failed error=%s", type(error).__name__)
        finally:
            self._num_open -= 1
            self._metrics.connections.dec()

    async def _secure(self, stream: trio.SocketStream) -> ClientStream | None:
        """Shake hands, if there is TLS; None if the client does not."""
        if self._tls is None:
            return stream
        secured = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
        try:
            with trio.fail_after(self._limits.header_seconds):
                await secured.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            await trio.aclose_forcefully(stream)
            return None
        return secured


async def _refuse(stream: trio.SocketStream) -> None:
    """Say that there are too many; a client above the limit costs a moment and no more."""
    with trio.move_on_after(_REFUSE_SECONDS), suppress(trio.BrokenResourceError):
        await stream.send_all(_BUSY % (len(_BUSY_BODY), _BUSY_BODY))
        await stream.send_eof()
        # Closing with its request unread would reset the connection before it reads the answer.
        await stream.receive_some()
    await trio.aclose_forcefully(stream)


async def listen(config: GatewayConfig) -> list[trio.SocketListener]:
    """The address clients dial, had at once.

    Raises InputError if it cannot be had, or is open to others and no key is set.
    """
    try:
        found = await trio.socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        if not config.api_keys and not all(is_local_name(str(entry[4][0])) for entry in found):
            raise InputError(
                f"{config.host} is open to other machines and no API key is set; "
                "set one with --api-key-file, or listen on 127.0.0.1"
            )
        return await trio.open_tcp_listeners(config.port, host=config.host, backlog=_BACKLOG)
    except OSError as error:
        raise InputError(
            f"cannot listen on {config.host}:{config.port}: {error}; choose another with --port"
        ) from error


def _host(listener: trio.SocketListener) -> str:
    return str(listener.socket.getsockname()[0])


def _url(listener: trio.SocketListener, *, is_secure: bool) -> str:
    scheme = "https" if is_secure else "http"
    host, port = listener.socket.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
