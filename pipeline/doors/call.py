"""One request to a door while it is read and answered, whatever it is encoded in."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import trio

from pipeline.doors.messages import DoorError, DoorFault, Payload

MAX_MESSAGE_BYTES = 100 << 20  # what the older server and clients of gRPC allow each other
# Of all requests' bodies at once. Attack: many connections that each send most of a body, and wait.
_MAX_BUFFERED_BYTES = 8 * MAX_MESSAGE_BYTES
# Attack: bodies a byte at a time, and answers that nobody takes. 100 MiB in this is 7 Mbit/s.
_TRANSFER_SECONDS = 120.0
_DRAIN_SECONDS = 1.0
# What is handed to the connection at once: that much of an answer is copied at a time.
_CHUNK_BYTES = 256 << 10

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class BodyBudget:
    """How much of all requests' bodies may still be held."""

    def __init__(self, num_bytes: int = _MAX_BUFFERED_BYTES) -> None:
        self.num_left = num_bytes


class Call:
    """A request as ASGI has it; its body, of at most `max_bytes`, is taken in as it comes."""

    def __init__(
        self,
        scope: Mapping[str, Any],
        receive: Receive,
        send: Send,
        *,
        budget: BodyBudget,
        max_bytes: int,
    ) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: Mapping[bytes, bytes] = dict(scope["headers"])
        self._receive = receive
        self._send = send
        self._budget = budget
        self._max_bytes = max_bytes
        self._body = bytearray()
        self._is_whole = False
        self._is_answered = False
        self._refusal: DoorError | None = None
        self._news = trio.Event()

    async def run(self, respond: Callable[["Call"], Awaitable[None]]) -> None:
        """Answer by `respond`, which is cancelled when the client leaves."""
        try:
            async with trio.open_nursery() as nursery:
                work = trio.CancelScope()
                nursery.start_soon(self._pump, work)
                with work:
                    await respond(self)
        finally:
            self._forget()

    async def read(self, num_bytes: int | None = None) -> memoryview:
        """The body, or its first bytes as soon as there are so many.

        Raises DoorError: it is too large or too slow, or there is no room for it.
        """
        with trio.move_on_after(_TRANSFER_SECONDS):
            while not self._is_whole and (num_bytes is None or len(self._body) < num_bytes):
                if self._refusal is not None:
                    break
                self._news = trio.Event()
                await self._news.wait()
            if self._refusal is not None:
                raise self._refusal
            # A view of a body that still grows would keep it from growing.
            return memoryview(self._body if self._is_whole else bytes(self._body[:num_bytes]))
        raise DoorError(DoorFault.TOO_SLOW, "the request's body did not arrive in time")

    async def answer(
        self,
        status: int,
        headers: Mapping[str, str],
        parts: Sequence[Payload],
        trailers: Mapping[str, str] | None = None,
    ) -> None:
        """Send the whole answer; one that is not taken in time is left unfinished."""
        with trio.move_on_after(_TRANSFER_SECONDS):
            await self._send(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": _encoded(headers),
                    "trailers": trailers is not None,
                }
            )
            for chunk in _chunks(parts):
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
            if trailers is None:
                await self._drain()
                self._is_answered = True
            await self._send({"type": "http.response.body", "body": b""})
            if trailers is not None:
                self._is_answered = True
                await self._send({"type": "http.response.trailers", "headers": _encoded(trailers)})

    async def _drain(self) -> None:
        """Let the rest of the body come, for a moment.

        A client on HTTP/1.1 sends it before it reads; closing earlier resets its connection.
        """
        with trio.move_on_after(_DRAIN_SECONDS):
            while not self._is_whole:
                self._news = trio.Event()
                await self._news.wait()

    async def _pump(self, work: trio.CancelScope) -> None:
        """Take what comes until the client leaves, or has its answer, which ends as a disconnect.

        A connection stands still, and hears of no cancellation, while nobody takes its events.
        """
        while (message := await self._receive())["type"] != "http.disconnect":
            self._take(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            self._news.set()
        # The connection tells of an answer's end while it still sends the last of it.
        if not self._is_answered:
            work.cancel()

    def _take(self, chunk: bytes) -> None:
        if self._refusal is not None:
            return
        if len(self._body) + len(chunk) > self._max_bytes:
            self._refusal = DoorError(
                DoorFault.TOO_LARGE, f"the request's body is larger than {self._max_bytes} bytes"
            )
            self._forget()
        elif len(chunk) > self._budget.num_left:
            self._refusal = DoorError(
                DoorFault.BUSY, "too much is being sent to this door at once; try again"
            )
            self._forget()
        else:
            self._budget.num_left -= len(chunk)
            self._body += chunk  # a bytearray grows in place; bytes would be copied every time

    def _forget(self) -> None:
        self._budget.num_left += len(self._body)
        self._body = bytearray()


def _chunks(parts: Sequence[Payload]) -> Iterator[bytes]:
    """All that is to be sent, small parts together, as each chunk costs the connection time."""
    gathered = bytearray()
    for part in parts:
        view = memoryview(part)
        while view:
            size = _CHUNK_BYTES - len(gathered)
            gathered += view[:size]
            view = view[size:]
            if len(gathered) == _CHUNK_BYTES:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
