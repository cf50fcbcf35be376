"""Whether a worker is alive, and ready: plain HTTP for the engine that watches it.

Answered by a thread of its own, for the worker's looks up neither while it loads weights nor while
it computes. Attack: whoever reaches the port may ask, as often as they like. All there is to learn
is yes or no, and no number of connections keeps the next one from being answered.
"""

import logging
import math
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from pipeline.tasks import open_tasks
from transport.dial_and_listen import Endpoint, Listener, listen
from transport.errors import EndpointError
from transport.pending_connections import Guest, Lobby, source_of

logger = logging.getLogger(__name__)

ALIVE, READY = b"/livez", b"/readyz"
# Probes send some two hundred bytes, at once.
MAX_REQUEST_BYTES = 8192
MAX_CONNECTIONS = 32
PATIENCE_SECONDS = 5.0
# How long an event loop may not turn: longer than the longest step, since a stage computes without
# looking up. As `WatchdogSec` of its unit.
STUCK_SECONDS = 120.0
_BEAT_SECONDS = 1.0


class Health:
    """What probes are told; the worker says it, and another thread reads it."""

    def __init__(self) -> None:
        self.is_ready = False
        self._turned_at = math.inf  # before there is an event loop it cannot be stuck

    @property
    def is_alive(self) -> bool:
        """False once an event loop that has begun to turn does so no more."""
        return time.monotonic() - self._turned_at < STUCK_SECONDS

    async def keep_turning(self) -> None:
        """Note that this event loop turns, until cancelled."""
        while True:
            self._turned_at = time.monotonic()
            await trio.sleep(_BEAT_SECONDS)


def answer(request: bytes, health: Health) -> bytes | None:
    """All that is sent back for what has come of a request; None where more has to come."""
    head, end, _ = request.partition(b"\r\n\r\n")
    if not end and len(request) < MAX_REQUEST_BYTES:
        return None
    words = head.partition(b"\r\n")[0].split(b" ")
    if not end or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return _response("400 Bad Request")
    method, target, _ = words
    if method not in {b"GET", b"HEAD"}:
        return _response("405 Method Not Allowed", "Allow: GET, HEAD\r\n")
    found = {ALIVE: health.is_alive, READY: health.is_ready}.get(target.partition(b"?")[0])
    if found is None:
        return _response("404 Not Found")
    return _response("200 OK" if found else "503 Service Unavailable")


def _response(status: str, header: str = "") -> bytes:
    """Without a body, as to a HEAD: the status says all."""
    return (
        f"HTTP/1.1 {status}\r\n{header}"
        "Content-Length: 0\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    ).encode()


@contextmanager
def answering(endpoint: Endpoint, health: Health) -> Iterator[Listener]:
    """Whoever asks there is answered meanwhile. Raises EndpointError where it cannot listen."""
    with listen(endpoint) as listener:
        stopping = trio.CancelScope()
        begun: queue.SimpleQueue[trio.lowlevel.TrioToken] = queue.SimpleQueue()

        async def main() -> None:
            begun.put(trio.lowlevel.current_trio_token())
            with stopping:
                await _answer_all(listener, health)

        # Nothing that goes wrong in here shall keep a worker that has ended.
        thread = threading.Thread(target=trio.run, args=(main,), name="health", daemon=True)
        thread.start()
        token = begun.get()
        logger.info("event=health_answered address=%s", listener.endpoint)
        try:
            yield listener
        finally:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(stopping.cancel)
            thread.join()


async def _answer_all(listener: Listener, health: Health) -> None:
    lobby = Lobby(MAX_CONNECTIONS)
    try:
        async with open_tasks() as tasks:
            while True:
                sock = await listener.accept()
                guest = lobby.enter(source_of(sock))
                assert guest is not None  # none here counts as established: all make room
                tasks.start_soon(_attend, sock, guest, lobby, health)
    except EndpointError as error:
        logger.error("event=health_failed error=%s", error)


async def _attend(sock: socket.socket, guest: Guest, lobby: Lobby, health: Health) -> None:
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    try:
        with guest.scope, trio.move_on_after(PATIENCE_SECONDS):
            request = b""
            while (reply := answer(request, health)) is None:
                piece = await stream.receive_some(MAX_REQUEST_BYTES - len(request))
                if not piece:
                    return
                request += piece
            await stream.send_all(reply)
    except trio.BrokenResourceError:
        pass  # whoever asked has gone
    finally:
        lobby.leave(guest)
        await trio.aclose_forcefully(stream)
