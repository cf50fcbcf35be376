"""A raw non-blocking socket under trio: the event loop only where a system call would block.

That is what makes a small frame cheap; `trio.SocketStream` goes through the loop every time.
"""

import select
import socket
from time import perf_counter_ns

import trio

from transport.errors import ConnectionLost
from transport.record_counters import WireTally

# After this many system calls in a row that never waited, let the other tasks have a turn.
FAIR_CALLS = 16
# While it waits in place, they have one that often.
FAIR_NS = 20_000_000
CLOSED = "another task closed this channel"


class Wire(WireTally):
    """One socket, owned; every async method is a checkpoint."""

    __slots__ = (
        "_looped_ns",
        "_poll",
        "_recv_into",
        "_send",
        "_sock",
        "_unwaited",
        "is_closed",
        "patience_ms",
    )

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._send = sock.send
        self._recv_into = sock.recv_into
        self.fd = sock.fileno()
        self.is_closed = False
        self._unwaited = 0
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)
        self.patience_ms = 0  # see `SecureChannel.wait_in_place`
        self._looped_ns = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.send_ns = 0  # system calls only, waiting excluded
        self.recv_ns = 0

    def close(self) -> None:
        """Close at once; tasks waiting on the socket get ClosedResourceError."""
        if not self.is_closed:
            self.is_closed = True
            self.fd = -1  # the number may be another socket's from now on
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def give_up(self) -> socket.socket:
        """The socket, for another owner; this is closed, and it is not."""
        self.is_closed = True
        self.fd = -1
        return self._sock

    async def turn(self) -> None:
        """Be cancellable, and now and then let other tasks run."""
        self._unwaited += 1
        if self._unwaited < FAIR_CALLS:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            self._unwaited = 0
            await trio.lowlevel.checkpoint()

    @property
    def is_turn_due(self) -> bool:
        """Whether other tasks have stood still for a while: best asked while nothing has come."""
        return perf_counter_ns() - self._looped_ns > FAIR_NS

    async def fair_turn(self) -> None:
        """Let other tasks run. Raises: trio.ClosedResourceError where one of them closes this."""
        await trio.lowlevel.checkpoint()
        self._looped_ns = perf_counter_ns()
        if self.is_closed:
            raise trio.ClosedResourceError(CLOSED)

    def has_come(self, patience_ms: int) -> bool:
        """Wait in place, that long at most; whether there is something to receive."""
        return bool(self._poll.poll(patience_ms))

    async def readable(self) -> None:
        """Wait until there is something to receive, or the end."""
        if self.patience_ms:
            if self.is_turn_due:
                await self.fair_turn()
            if self.has_come(self.patience_ms):
                await trio.lowlevel.checkpoint_if_cancelled()
                return
        self._unwaited = 0  # what waits lets the others run
        await trio.lowlevel.wait_readable(self.fd)

    def try_send(self, data: memoryview) -> int:
        """Send what the socket takes now, maybe nothing. Raises: as `send_all`."""
        started_ns = perf_counter_ns()
        try:
            num_sent = self._send(data)
        except BlockingIOError:
            self._unwaited = 0  # what waits lets the others run
            return 0
        except OSError as error:
            raise self.lost(error) from error
        self.send_ns += perf_counter_ns() - started_ns
        self.bytes_sent += num_sent
        return num_sent

    def try_receive(self, into: memoryview) -> int:
        """Receive what has arrived, maybe nothing. Raises: as `receive_exactly`."""
        started_ns = perf_counter_ns()
        try:
            num_received = self._recv_into(into)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.lost(error) from error
        self.recv_ns += perf_counter_ns() - started_ns
        if num_received == 0:
            raise self.ended()
        self.bytes_received += num_received
        return num_received

    async def send_all(self, data: memoryview) -> None:
        """Send all of `data`; cancelled, any part of it may have been sent.

        Raises: ConnectionLost, trio.ClosedResourceError.
        """
        await self.turn()
        while (num_sent := self.try_send(data)) < len(data):
            data = data[num_sent:]
            await trio.lowlevel.wait_writable(self.fd)

    async def receive_exactly(self, num_bytes: int) -> bytes:
        """Receive `num_bytes` and not one more.

        Raises: ConnectionLost at the end of the stream, trio.ClosedResourceError.
        """
        store = memoryview(bytearray(num_bytes))
        have = 0
        await self.turn()
        while (have := have + self.try_receive(store[have:])) < num_bytes:
            await self.readable()
        return bytes(store)

    def ended(self) -> ConnectionLost:
        """What the end of the stream means; the socket is closed."""
        self.close()
        return ConnectionLost("the connection ended without an authenticated close")

    def lost(self, error: OSError) -> Exception:
        """What a failed system call means; the socket is closed."""
        if self.is_closed:
            return trio.ClosedResourceError(CLOSED)
        self.close()
        return ConnectionLost(f"the connection broke: {error.strerror or error}")
