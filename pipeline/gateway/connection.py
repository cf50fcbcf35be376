"""One client's TCP connection: hypercorn's HTTP/1.1 on trio, with bounds on what it may hold."""

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
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


class Connection(TCPServer):
    """Serves one connection until either side ends it; closes its stream.

    Three things differ from hypercorn's own. A client that reads nothing is cut off after
    `write_seconds`, where hypercorn waits for ever, shielded from shutdown. HTTP/2 is not spoken:
    one connection is one request at a time, so that a limit on connections limits requests. And
    an idle connection the client has closed is closed at once, not when its idle time is over.
    """

    stream: trio.SocketStream  # type: ignore[assignment]  # hypercorn's annotation forgets plain TCP

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        stream: trio.SocketStream,
        write_seconds: float,
    ) -> None:
        super().__init__(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        self._write_seconds = write_seconds

    async def run(self) -> None:
        """Serve."""
        socket = self.stream.socket
        try:
            client = parse_socket_addr(socket.family, socket.getpeername())
            server = parse_socket_addr(socket.family, socket.getsockname())
            async with TaskGroup() as tasks:
                self._task_group = tasks
                self.protocol = H11Protocol(  # type: ignore[assignment]
                    self.app,
                    self.config,
                    self.context,
                    tasks,
                    ConnectionState({}),
                    False,
                    client,
                    server,
                    self.protocol_send,
                )
                await self.idle_task.restart(tasks, self._idle_timeout)
                await self._read_data()
                await self.idle_task.stop()
        except (OSError, H2ProtocolAssumedError, H2CProtocolRequiredError):
            pass  # the client is gone, or asks for a protocol this server does not offer
        finally:
            await self._close()

    async def protocol_send(self, event: Event) -> None:
        """Send bytes, or hear that the protocol is idle or done."""
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                with trio.fail_after(self._write_seconds):
                    await self.stream.send_all(event.data)
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                self.stream.socket.close()
                await self.protocol.handle(Closed())
            except trio.Cancelled:
                # Half a message may be out: nothing more can follow it on this connection.
                self.stream.socket.close()
                raise
