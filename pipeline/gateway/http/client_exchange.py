"""One request's two directions, as the endpoint sees them."""

from collections.abc import Callable
from typing import TypeVar

import trio
from starlette.types import Message, Receive, Scope, Send

from pipeline.gateway.errors import ApiError, Kind, busy
from pipeline.gateway.http.errors import to_response
from pipeline.gateway.metrics import RequestRecord

# A smaller body is read in less time than another thread needs to start, and always has room: a
# connection is one request, so that the limit on connections bounds what all such bodies hold.
SMALL_BYTES = 1 << 14
# A client that sends a body reads the answer afterwards; closing before resets its connection.
_DRAIN_SECONDS = 1.0

_Read = TypeVar("_Read")


class BodyBudget:
    """What may be held at once of all requests' bodies beyond the small part that each may have.

    Attack: many connections that each send most of a large body, and wait.
    """

    def __init__(self, max_bytes: int) -> None:
        self._num_left = max_bytes

    def take(self, num_bytes: int) -> None:
        """Raises ApiError if there is not so much left."""
        if num_bytes > self._num_left:
            raise busy("Too much is being sent to this server at once; try again.")
        self._num_left -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        """What was taken is held no more."""
        self._num_left += num_bytes


class Exchange:
    """A request while it is answered."""

    def __init__(
        self, receive: Receive, send: Send, record: RequestRecord, budget: BodyBudget
    ) -> None:
        self.record = record
        self.is_started = False
        # Whether the client has left: before its answer began, or before it had it whole.
        self.is_gone = False
        self.is_disconnected = False
        self.body = b""
        # Whose key it came with, once that is known.
        self.caller = b""
        self._num_held = 0
        self._is_finished = False
        self._is_read = False
        self._budget = budget
        self._receive = receive
        self._send = send

    async def read_body(self, max_bytes: int, declared_bytes: int) -> None:
        """Take in the whole body, of so many bytes by its head if that says how many.

        Raises ApiError if it is too large, or there is no room.
        """
        body = bytearray()  # rather than its chunks, which may be of a byte each
        while max(declared_bytes, len(body)) <= max_bytes and not self._is_read:
            body += await self._next_chunk()
            num_more = max(0, len(body) - SMALL_BYTES) - self._num_held
            self._budget.take(num_more)
            self._num_held += num_more
        if max(declared_bytes, len(body)) > max_bytes:
            raise ApiError(
                Kind.TOO_LARGE,
                f"The request's body is larger than {max_bytes} bytes.",
                code="request_too_large",
            )
        self.body = bytes(body)

    async def understand(self, read: Callable[[bytes], _Read]) -> _Read:
        """What the body says; a large one is read in a thread, where others need not wait for it.

        Raises what `read` does.
        """
        if len(self.body) <= SMALL_BYTES:
            return read(self.body)
        return await trio.to_thread.run_sync(read, self.body)

    def forget_body(self) -> None:
        """It has been understood, or never will be."""
        self._budget.give_back(self._num_held)
        self._num_held = 0
        self.body = b""

    async def drain(self, max_bytes: int) -> None:
        """Discard what is left of the body, for a moment and up to a size."""
        num_bytes = 0
        with trio.move_on_after(_DRAIN_SECONDS):
            while not self._is_read and num_bytes < max_bytes:
                num_bytes += len(await self._next_chunk())

    async def refuse(self, error: ApiError, scope: Scope, max_bytes: int) -> None:
        """Answer at once, then discard up to `max_bytes` of what is left of the body."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                await self.send({**message, "more_body": True})
                await self.drain(max_bytes)
                message = {"type": "http.response.body", "body": b""}
            await self.send(message)

        self.forget_body()
        await to_response(error, scope["path"])(scope, self.receive, send)

    async def _next_chunk(self) -> bytes:
        message = await self._receive()
        self.is_gone = message["type"] == "http.disconnect" and not self.is_started
        self._is_read = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk

    async def watch(self, cancel: Callable[[], None]) -> None:
        """Wait for the client to leave; unless it has its answer, `cancel`.

        Reads on until then, since the server stalls a connection whose events nobody takes.
        """
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._is_finished:
            self.is_disconnected = True
            cancel()

    async def receive(self) -> Message:
        """No body: endpoints find it here. A disconnect cancels them rather than telling them."""
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Message) -> None:
        """Pass a message on; the server reports every finished response as a disconnect."""
        if message["type"] == "http.response.start":
            self.is_started = True
            self.record.status = message["status"]
            request_id = (b"x-request-id", self.record.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), request_id]}
        elif not message.get("more_body", False):
            self._is_finished = True
        await self._send(message)
