"""One client's TCP connection: hypercorn's HTTP/1.1 on trio, with bounds on what it may hold."""

from contextlib import suppress
from typing import TypeAlias

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import (
    H2CProtocolRequiredError,
    H2ProtocolAssumedError,
    H11Protocol,
)
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr

_CHUNK_BYTES = 1 << 16
# A next request or two; beyond, a client that has left is noticed when its turn comes.
_MAX_CHUNKS_AHEAD = 2

ClientStream: TypeAlias = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class ClientConnection(TCPServer):
    """Serves one connection until either side ends it; closes its stream.

    What differs from hypercorn's own, each against clients that would hold resources:

    - One that reads nothing is cut off after `write_seconds`; hypercorn waits for ever, shielded
      from shutdown.
    - One that has left is noticed at once, even if it sent its next request before; hypercorn
      stops reading then, and keeps the connection if it breaks meanwhile.
    - HTTP/2 is not spoken unless a subclass names it: one connection is one request at a time, so
      that a limit on connections limits requests.
    """

    protocol_class: type[H11Protocol | H2Protocol] = H11Protocol
    stream: ClientStream  # type: ignore[assignment]  # hypercorn's annotation forgets plain TCP

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        stream: ClientStream,
        write_seconds: float,
        leaving: trio.Lock,
    ) -> None:
        """Connections that share the lock `leaving` end in turn, when their clients have left."""
        super().__init__(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        self._is_secure = isinstance(stream, trio.SSLStream)
        self._socket = (
            stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
        ).socket
        self._write_seconds = write_seconds
        self._leaving = leaving
        self._is_over = False

    async def run(self) -> None:
        """Serve."""
        socket = self._socket
        try:
            client = parse_socket_addr(socket.family, socket.getpeername())
            server = parse_socket_addr(socket.family, socket.getsockname())
            async with TaskGroup() as tasks:
                self._task_group = tasks
                self.protocol = self.protocol_class(  # type: ignore[assignment]
                    self.app,
                    self.config,
                    self.context,
                    tasks,
                    ConnectionState({}),
                    self._is_secure,
                    client,
                    server,
                    self.protocol_send,
                )
                await self.protocol.initiate()
                await self.idle_task.restart(tasks, self._idle_timeout)
                await self._read_data()
                self._is_over = True
                await self.idle_task.stop()
        except OSError:
            pass  # the client was gone before it was served
        finally:
            with trio.move_on_after(self._write_seconds):  # TLS says goodbye
                await self._close()

    async def _read_data(self) -> None:
        """Read until either side closes the connection; what came ahead of its turn waits."""
        ahead, due = trio.open_memory_channel[bytes](_MAX_CHUNKS_AHEAD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._feed, due)
            with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
                while data := bytes(await self.stream.receive_some(_CHUNK_BYTES)):
                    await ahead.send(data)
            # Attack: all hang up at once, and ending them takes all the time there is.
            async with self._leaving:
                nursery.cancel_scope.cancel()
        await self.protocol.handle(Closed())

    async def _feed(self, due: trio.MemoryReceiveChannel[bytes]) -> None:
        async for data in due:
            try:
                await self.protocol.handle(RawData(data))
            except (H2ProtocolAssumedError, H2CProtocolRequiredError):
                await self._close()

    async def protocol_send(self, event: Event) -> None:
        """Send bytes, or hear that the protocol is idle or done."""
        if not isinstance(event, RawData):
            # A connection that is over has no idle time: waiting for its end would keep it open.
            if not (self._is_over and isinstance(event, Updated)):
                await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                with trio.fail_after(self._write_seconds):
                    await self.stream.send_all(event.data)
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                self._socket.close()
                await self.protocol.handle(Closed())
            except trio.Cancelled:
                # Half a message may be out: nothing more can follow it on this connection.
                self._socket.close()
                raise
