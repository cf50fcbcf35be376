"""A blind relay: moves bytes between two endpoints and understands none of them.

What it carries is ciphertext of channels that authenticate their ends, so the relay is trusted with
availability alone.
"""

import errno
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import trio

from transport.endpoint import Endpoint, Listener, TcpEndpoint, dial, listen, parse_endpoint
from transport.errors import EndpointError

# One buffer a direction, filled only when it is empty: a peer that does not read stops the other
# one through the kernel's flow control, and a connection never costs more memory than this twice.
BUFFER_BYTES: Final = 256 * 1024
DIAL_DEADLINE_S: Final = 10.0  # an unreachable target must not hold the caller's place for minutes
DEFAULT_MAX_CONNECTIONS: Final = 64  # 32 MiB of buffers; a stage needs three

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelayMap:
    """Connections to `listen` are carried to `target`, at most `max_connections` at a time."""

    listen: Endpoint
    target: Endpoint
    max_connections: int = DEFAULT_MAX_CONNECTIONS

    def __str__(self) -> str:
        return f"{self.listen}={self.target}"


@dataclass(slots=True)
class RelayStats:
    """What one map has carried so far."""

    accepted: int = 0
    active: int = 0
    refused_over_limit: int = 0
    failed_dials: int = 0
    bytes_to_target: int = 0
    bytes_from_target: int = 0


@dataclass(slots=True)
class _Connection:
    """Counts one connection's bytes, into its map's running totals too."""

    stats: RelayStats
    reason: str = "cancelled"  # why it ended
    bytes_to_target: int = 0
    bytes_from_target: int = 0

    def count_to_target(self, num_bytes: int) -> None:
        self.bytes_to_target += num_bytes
        self.stats.bytes_to_target += num_bytes

    def count_from_target(self, num_bytes: int) -> None:
        self.bytes_from_target += num_bytes
        self.stats.bytes_from_target += num_bytes


def parse_map(text: str, max_connections: int = DEFAULT_MAX_CONNECTIONS) -> RelayMap:
    """The map that `LISTEN=TARGET` names. Raises: EndpointError."""
    listen_text, equals, target_text = text.partition("=")
    if not equals or "=" in target_text:
        raise EndpointError(
            f"map {text!r} is not LISTEN=TARGET; write for example tcp:0.0.0.0:9000=vsock:16:5000"
        )
    if max_connections < 1:
        raise EndpointError(f"connection limit {max_connections} carries nothing; choose 1 or more")
    return RelayMap(parse_endpoint(listen_text), parse_endpoint(target_text), max_connections)


class Relay:
    """Several maps in one process, bound at construction.

    Raises: EndpointError where a map cannot listen; then nothing is left bound.
    """

    def __init__(self, maps: Sequence[RelayMap]) -> None:
        self.stats = {mapping: RelayStats() for mapping in maps}
        self.listeners: dict[RelayMap, Listener] = {}
        try:
            for mapping in self.stats:
                self.listeners[mapping] = listen(mapping.listen)
        except EndpointError:
            self.close()
            raise

    def close(self) -> None:
        """Stops listening; `run` ends when the connections it carries have. Idempotent."""
        for listener in self.listeners.values():
            listener.close()

    async def run(self) -> None:
        """Carries connections until closed or, cutting them, cancelled.

        Raises: EndpointError, in an exception group, where a listener breaks.
        """
        try:
            async with trio.open_nursery() as nursery:
                for mapping, listener in self.listeners.items():
                    nursery.start_soon(self._serve, mapping, listener, nursery)
        finally:
            self.close()

    async def _serve(self, mapping: RelayMap, listener: Listener, nursery: trio.Nursery) -> None:
        stats = self.stats[mapping]
        while True:
            try:
                incoming = await listener.accept()
            except trio.ClosedResourceError:
                return
            if stats.active >= mapping.max_connections:
                stats.refused_over_limit += 1
                incoming.close()
                _log.warning("refused map=%s limit=%d", mapping, mapping.max_connections)
                continue
            stats.accepted += 1
            stats.active += 1
            nursery.start_soon(_carry, mapping, stats, incoming)


async def _carry(mapping: RelayMap, stats: RelayStats, incoming: socket.socket) -> None:
    """One connection from accept to its log line; nothing that happens to it leaves this task."""
    started = trio.current_time()
    connection = _Connection(stats)
    try:
        with _closing(incoming):
            outgoing = await _dial_target(mapping.target)
            with _closing(outgoing):
                _keep_alive(mapping.listen, incoming)
                _keep_alive(mapping.target, outgoing)
                await _pump_both(incoming, outgoing, connection)
    except EndpointError as error:
        stats.failed_dials += 1
        connection.reason = "dial-failed"
        _log.warning("dial failed map=%s error=%s", mapping, error)
    finally:
        stats.active -= 1
        if connection.reason != "dial-failed":
            _log.info(
                "carried map=%s reason=%s seconds=%.3f bytes_to_target=%d bytes_from_target=%d",
                mapping,
                connection.reason,
                trio.current_time() - started,
                connection.bytes_to_target,
                connection.bytes_from_target,
            )


async def _pump_both(
    incoming: socket.socket, outgoing: socket.socket, connection: _Connection
) -> None:
    """Both directions until each has ended, or until one breaks: then neither has a future."""

    async def pump(
        source: socket.socket, sink: socket.socket, count: Callable[[int], None]
    ) -> None:
        try:
            await _pump(source, sink, count)
        except OSError as error:
            connection.reason = errno.errorcode.get(error.errno or 0, "broken").lower()
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump, incoming, outgoing, connection.count_to_target)
        nursery.start_soon(pump, outgoing, incoming, connection.count_from_target)
    if connection.reason == "cancelled":
        connection.reason = "closed"


async def _dial_target(target: Endpoint) -> socket.socket:
    with trio.move_on_after(DIAL_DEADLINE_S):
        return await dial(target)
    raise EndpointError(
        f"cannot dial {target}: no answer in {DIAL_DEADLINE_S:.0f} s; check that it is up"
    )


@contextmanager
def _closing(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    finally:
        trio.lowlevel.notify_closing(sock)
        sock.close()


def _keep_alive(endpoint: Endpoint, sock: socket.socket) -> None:
    """Has the kernel notice a peer that vanished, which would hold its place for ever."""
    if isinstance(endpoint, TcpEndpoint):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


async def _pump(source: socket.socket, sink: socket.socket, count: Callable[[int], None]) -> None:
    """Copies until the source ends, then ends the sink's stream: half of a connection."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while num_bytes := await _receive_into(source, buffer):
        await _send_all(sink, buffer[:num_bytes])
        count(num_bytes)
    with suppress(OSError):  # the sink may be gone already; its own direction reports that
        sink.shutdown(socket.SHUT_WR)


async def _receive_into(sock: socket.socket, buffer: memoryview) -> int:
    await trio.lowlevel.checkpoint()  # a source that always has data must not starve the others
    while True:
        try:
            return sock.recv_into(buffer)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


async def _send_all(sock: socket.socket, data: memoryview) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
