"""A blind relay: moves bytes between two endpoints and understands none of them.

What it carries is ciphertext of channels that authenticate their ends, so the relay is trusted with
availability alone.
"""

import errno
import logging
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import trio

from transport.dial_and_listen import Endpoint, Listener, TcpEndpoint, dial, listen, parse_endpoint
from transport.errors import EndpointError
from transport.pending_connections import Guest, Lobby, Standing, source_of

# One buffer a direction, filled only when it is empty: a peer that does not read stops the other
# one through the kernel's flow control, and a connection never costs more memory than this twice.
BUFFER_BYTES: Final = 256 * 1024
DIAL_DEADLINE_S: Final = 10.0  # an unreachable target must not hold the caller's place for minutes
SILENT_DEADLINE_S: Final = 10.0  # until one end says something: whoever dials has something to say
# A target that has ended its stream has nothing more to say, and mostly nobody who listens: what
# the caller still sends may follow, but a caller who only stays is cut off.
ORPHANED_DEADLINE_S: Final = 10.0
AWAY_REMINDER_S: Final = 60.0
DEFAULT_MAX_CONNECTIONS: Final = 64  # 32 MiB of buffers; a stage needs three
# A peer that vanished without a word is noticed after two minutes, not the kernel's two hours.
_KEEP_ALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)

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
    crowded_out: int = 0  # had to make room before its target had kept it for some time
    failed_dials: int = 0
    bytes_to_target: int = 0
    bytes_from_target: int = 0


@dataclass(slots=True)
class _Connection:
    """One connection: its bytes, in its map's running totals too, and its right to its place.

    The relay cannot know who authenticates. But a connection of which both ends have spoken, and
    the target has not ended for as long as a handshake may take, is one that the target keeps: it
    may be silent as long as it likes.
    """

    stats: RelayStats
    guest: Guest
    reason: str = "cancelled"  # why it ended
    bytes_to_target: int = 0
    bytes_from_target: int = 0
    is_orphaned: bool = False  # the target has ended its stream

    def count_to_target(self, num_bytes: int) -> None:
        self.bytes_to_target += num_bytes
        self.stats.bytes_to_target += num_bytes
        self._moved()

    def count_from_target(self, num_bytes: int) -> None:
        self.bytes_from_target += num_bytes
        self.stats.bytes_from_target += num_bytes
        self._moved()

    def end_from_target(self) -> None:
        self.is_orphaned = True
        self._moved()

    def _moved(self) -> None:
        if self.bytes_to_target and self.bytes_from_target and not self.is_orphaned:
            self.guest.answer()
        else:
            self.guest.standing = Standing.HEARD
        self.guest.scope.deadline = (
            trio.current_time() + ORPHANED_DEADLINE_S if self.is_orphaned else math.inf
        )


class _Outage:
    """How much is said of a map's target that is away, and whose callers come again and again."""

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """It is there: the next time that it is not will be news."""
        self._quiet_until = -math.inf

    def is_reminder_due(self) -> bool:
        """At first and once a minute."""
        now = trio.current_time()
        is_due = now >= self._quiet_until
        if is_due:
            self._quiet_until = now + AWAY_REMINDER_S
        return is_due


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
        stats, lobby = self.stats[mapping], Lobby(mapping.max_connections)
        outage = _Outage()
        while True:
            try:
                incoming = await listener.accept()
            except trio.ClosedResourceError:
                return
            guest = lobby.enter(source_of(incoming))
            if guest is None:
                stats.refused_over_limit += 1
                incoming.close()
                _log.warning("refused map=%s limit=%d", mapping, mapping.max_connections)
                continue
            stats.accepted += 1
            stats.active += 1
            nursery.start_soon(_carry, mapping, _Connection(stats, guest), lobby, incoming, outage)


async def _carry(
    mapping: RelayMap,
    connection: _Connection,
    lobby: Lobby,
    incoming: socket.socket,
    outage: _Outage,
) -> None:
    """One connection from accept to its log line; nothing that happens to it leaves this task."""
    started = trio.current_time()
    stats, scope = connection.stats, connection.guest.scope
    try:
        with scope, _closing(incoming):
            outgoing = await _dial_target(mapping.target)
            with _closing(outgoing):
                _keep_alive(mapping.listen, incoming)
                _keep_alive(mapping.target, outgoing)
                scope.deadline = trio.current_time() + SILENT_DEADLINE_S
                outage.end()
                await _pump_both(incoming, outgoing, connection)
        if scope.cancelled_caught:
            if trio.current_time() < scope.deadline:
                stats.crowded_out += 1
                connection.reason = "crowded-out"
            else:
                connection.reason = "orphaned" if connection.is_orphaned else "silent"
    except EndpointError as error:
        stats.failed_dials += 1
        connection.reason = "dial-failed"
        level = logging.WARNING if outage.is_reminder_due() else logging.DEBUG
        _log.log(level, "dial failed map=%s error=%s", mapping, error)
    finally:
        lobby.leave(connection.guest)
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
            if source is outgoing:
                connection.end_from_target()
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
        for level, option, value in _KEEP_ALIVE:
            sock.setsockopt(level, option, value)


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
