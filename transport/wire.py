"""A raw non-blocking socket under trio: system calls first, the event loop only when they block.

That is what makes a small frame cheap; `trio.SocketStream` goes through the loop every time.
"""

import socket
from time import perf_counter_ns

import trio

from transport.errors import ConnectionLost

# After this many system calls in a row that never waited, let the other tasks have a turn.
FAIR_CALLS = 16


class Wire:
    """One socket, owned; every method but `close` is a checkpoint."""

    __slots__ = (
        "_sock",
        "_unwaited",
        "bytes_received",
        "bytes_sent",
        "recv_ns",
        "send_ns",
    )

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._unwaited = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.send_ns = 0  # system calls only, waiting excluded
        self.recv_ns = 0

    @property
    def is_closed(self) -> bool:
        """Whether the socket is gone."""
        return self._sock.fileno() < 0

    def close(self) -> None:
        """Close at once; tasks waiting on the socket get ClosedResourceError."""
        if not self.is_closed:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    async def turn(self) -> None:
        """Be cancellable, and now and then let other tasks run."""
        self._unwaited += 1
        if self._unwaited < FAIR_CALLS:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            self._unwaited = 0
            await trio.lowlevel.checkpoint()

    async def send_all(self, data: memoryview) -> None:
        """Send all of `data`; cancelled, any part of it may have been sent.

        Raises: ConnectionLost, trio.ClosedResourceError.
        """
        while True:
            await self.turn()
            num_sent = self._try_send(data)
            if num_sent == len(data):
                return
            if num_sent == 0:
                self._unwaited = 0
                await trio.lowlevel.wait_writable(self._sock)
            data = data[num_sent:]

    async def receive_some(self, into: memoryview) -> int:
        """Receive at least one byte into `into`; cancelled, none has been taken.

        Raises: ConnectionLost at the end of the stream, trio.ClosedResourceError.
        """
        while True:
            await self.turn()
            num_received = self._try_receive(into)
            if num_received:
                return num_received
            self._unwaited = 0
            await trio.lowlevel.wait_readable(self._sock)

    async def receive_exactly(self, num_bytes: int) -> bytes:
        """Receive `num_bytes` and not one more. Raises: as `receive_some`."""
        store = memoryview(bytearray(num_bytes))
        have = 0
        while have < num_bytes:
            have += await self.receive_some(store[have:])
        return bytes(store)

    def _try_send(self, data: memoryview) -> int:
        started_ns = perf_counter_ns()
        try:
            num_sent = self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(error) from error
        self.send_ns += perf_counter_ns() - started_ns
        self.bytes_sent += num_sent
        return num_sent

    def _try_receive(self, into: memoryview) -> int:
        started_ns = perf_counter_ns()
        try:
            num_received = self._sock.recv_into(into)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(error) from error
        self.recv_ns += perf_counter_ns() - started_ns
        if num_received == 0:
            raise ConnectionLost("the connection ended without an authenticated close")
        self.bytes_received += num_received
        return num_received

    def _lost(self, error: OSError) -> Exception:
        if self.is_closed:
            return trio.ClosedResourceError("another task closed this channel")
        return ConnectionLost(f"the connection broke: {error.strerror or error}")
