"""The sockets of a door: gRPC on HTTP/2 and JSON on HTTP/1.1, both hypercorn's, each bounded."""

import logging
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import h2.events
import h2.exceptions
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Response
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework

from pipeline.doors.call import BodyBudget
from pipeline.doors.grpc_app import GrpcApp
from pipeline.doors.guarded import GuardedDoor
from pipeline.doors.http2_link import widen
from pipeline.doors.http_app import HttpApp
from pipeline.doors.messages import Door
from pipeline.errors import InputError
from pipeline.gateway.http.hypercorn_connection import ClientConnection, ClientStream

logger = logging.getLogger(__name__)

_BACKLOG = 256
_MAX_CONNECTIONS = 256  # of each listener
_MAX_STREAMS = 32  # at once on a connection
_MAX_HEADER_BYTES = 32 << 10
_IDLE_SECONDS = 60.0
_HANDSHAKE_SECONDS = 10.0
_WRITE_SECONDS = 60.0
# Attack: streams that are opened and reset at once cost a client nothing and a server each a task.
_MAX_RESETS = 1000
# How long calls that run when the door is told to stop may take.
_GRACE_SECONDS = 10.0
_READ_BYTES = 256 << 10
_PREFACE = b"PRI * HTTP/2"
_NOT_HTTP2 = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nconnection: close\r\n"
    b"content-type: text/plain\r\n\r\nthis port speaks gRPC, on HTTP/2 only\n"
)


@dataclass(frozen=True, slots=True)
class Listening:
    """Where one kind of door is open."""

    listeners: Sequence[trio.SocketListener]
    tls: ssl.SSLContext | None


class _Http2(H2Protocol):
    """hypercorn's HTTP/2 with windows for large messages, and for clients that misbehave."""

    _num_resets = 0
    _is_begun = False
    _holds_back = False

    async def initiate(
        self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None
    ) -> None:
        """Begin the connection."""
        await super().initiate(headers, settings)
        widen(self.connection)
        await self._flush()

    async def handle(self, event: Event) -> None:
        """Take what has come in."""
        if isinstance(event, RawData) and event.data and not self._is_begun:
            self._is_begun = True
            if not event.data.startswith(_PREFACE[: len(event.data)]):
                await self.send(RawData(_NOT_HTTP2))
                await self.send(Closed())
                return
        await super().handle(event)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send more of an answer; its head with what follows."""
        self._holds_back = isinstance(event, Response)
        await super().stream_send(event)

    async def _flush(self) -> None:
        if self._holds_back:
            self._holds_back = False
            return
        # Whoever is about to add something does so now, and one packet has it all.
        await trio.lowlevel.checkpoint()
        await super()._flush()

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.StreamReset):
                self._num_resets += 1
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                # The call was answered before its body ended, and its client has yet to hear it.
                with suppress(h2.exceptions.ProtocolError):
                    self.connection.reset_stream(event.stream_id)
                continue
            await super()._handle_events([event])
        if self._num_resets > _MAX_RESETS:
            await self.send(Closed())


class _GrpcConnection(ClientConnection):
    protocol_class = _Http2

    async def _read_data(self) -> None:
        """Read until either side closes the connection; no call keeps others from being read."""
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            while data := bytes(await self.stream.receive_some(_READ_BYTES)):
                await self.protocol.handle(RawData(data))
        await self.protocol.handle(Closed())


class DoorServer:
    """Serves a door on sockets, until it is cancelled; then running calls may end."""

    def __init__(self, door: Door) -> None:
        self._context = WorkerContext(None)
        self._config = Config()
        self._config.errorlog = None  # its tracebacks may quote content; the applications log
        self._config.accesslog = None
        self._config.keep_alive_timeout = _IDLE_SECONDS
        self._config.keep_alive_max_requests = 1 << 62  # sessions are longer than a thousand steps
        self._config.h11_max_incomplete_size = _MAX_HEADER_BYTES
        self._config.h2_max_header_list_size = _MAX_HEADER_BYTES
        self._config.h2_max_concurrent_streams = _MAX_STREAMS
        self._config.include_server_header = False
        self._leaving = trio.Lock()
        guarded, budget = GuardedDoor(door), BodyBudget()
        self._http_app = HttpApp(guarded, budget)
        self._grpc_app = GrpcApp(guarded, budget)

    async def serve(self, grpc: Listening | None, http: Listening | None) -> None:
        """Serve until cancelled."""
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_until, stop, grpc, http)
            try:
                await trio.sleep_forever()
            finally:
                stop.set()

    async def _serve_until(
        self, stop: trio.Event, grpc: Listening | None, http: Listening | None
    ) -> None:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as connections:
                async with trio.open_nursery() as accepting:
                    for kind, app, place in (
                        (_GrpcConnection, self._grpc_app, grpc),
                        (ClientConnection, self._http_app, http),
                    ):
                        if place is not None:
                            accepting.start_soon(self._accept, connections, kind, app, place)
                    accepting.start_soon(self._http_app.run_jobs)
                    await stop.wait()
                    accepting.cancel_scope.cancel()
                await self._context.terminated.set()
                connections.cancel_scope.deadline = trio.current_time() + _GRACE_SECONDS

    async def _accept(
        self,
        connections: trio.Nursery,
        kind: type[ClientConnection],
        app: GrpcApp | HttpApp,
        place: Listening,
    ) -> None:
        wrapped = ASGIWrapper(cast(ASGIFramework, app))
        num_open = 0

        async def handle(stream: trio.SocketStream) -> None:
            nonlocal num_open
            if num_open >= _MAX_CONNECTIONS:
                await trio.aclose_forcefully(stream)
                return
            num_open += 1
            try:
                secured = await _secure(stream, place.tls)
                if secured is not None:
                    await kind(
                        wrapped, self._config, self._context, secured, _WRITE_SECONDS, self._leaving
                    ).run()
            except Exception as error:
                logger.error("event=connection_failed error=%s", type(error).__name__)
            finally:
                num_open -= 1

        await trio.serve_listeners(handle, list(place.listeners), handler_nursery=connections)


async def _secure(stream: trio.SocketStream, tls: ssl.SSLContext | None) -> ClientStream | None:
    """Shake hands, if there is TLS; None if the client does not."""
    if tls is None:
        return stream
    secured = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
    try:
        with trio.fail_after(_HANDSHAKE_SECONDS):
            await secured.do_handshake()
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        await trio.aclose_forcefully(stream)
        return None
    return secured


async def listen(host: str, port: int) -> list[trio.SocketListener]:
    """The address clients dial, had at once. Raises InputError."""
    try:
        return await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
