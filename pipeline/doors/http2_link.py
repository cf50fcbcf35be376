"""A client's connection of HTTP/2: h2 keeps the protocol, trio moves the bytes."""

from collections.abc import Sequence
from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio

from pipeline.doors.messages import Payload

WINDOW_BYTES = 4 << 20
FRAME_BYTES = 1 << 20
_DEFAULT_WINDOW_BYTES = (1 << 16) - 1
_MAX_UNSENT_BYTES = 4 << 20
_READ_BYTES = 1 << 18

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


def widen(connection: h2.connection.H2Connection) -> None:
    """Let the peer send more than HTTP/2's defaults, 64 KiB a round trip in frames of 16 KiB."""
    codes = h2.settings.SettingCodes
    connection.update_settings(
        {codes.INITIAL_WINDOW_SIZE: WINDOW_BYTES, codes.MAX_FRAME_SIZE: FRAME_BYTES}
    )
    connection.increment_flow_control_window(WINDOW_BYTES - _DEFAULT_WINDOW_BYTES)


class LinkLost(Exception):
    """The connection ended, or the peer gave a call up."""


class Reply:
    """What comes back of one call."""

    def __init__(self, max_bytes: int) -> None:
        self.headers: dict[str, str] = {}
        self.trailers: dict[str, str] = {}
        self.body = bytearray()
        self.max_bytes = max_bytes
        self.failure: str | None = None
        self.ended = trio.Event()

    def end(self, failure: str | None = None) -> None:
        """Nothing more comes."""
        if not self.ended.is_set():
            self.failure = failure
            self.ended.set()


class Http2Link:
    """One connection; `run` moves its bytes, in a task of its own, until it ends."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self._h2 = h2.connection.H2Connection(config)
        self._h2.initiate_connection()
        widen(self._h2)
        self._replies: dict[int, Reply] = {}
        self._news = trio.Event()  # a window has opened, or bytes have left
        self._due = trio.Event()  # there is something to send
        self._due.set()
        self._num_unsent = 0
        self.is_over = False

    async def run(self) -> None:
        """Move bytes until the connection ends, however it does."""
        reason = "it closed the connection"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                nursery.cancel_scope.cancel()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            reason = "the connection broke"
        except* h2.exceptions.ProtocolError:
            reason = "it does not keep to HTTP/2"
        finally:
            self.is_over = True
            for reply in self._replies.values():
                reply.end(reason)
            self._tell()
            await trio.aclose_forcefully(self._stream)

    async def call(
        self, headers: Sequence[tuple[str, str]], parts: Sequence[Payload], max_bytes: int
    ) -> Reply:
        """Send a request; the whole answer, of at most so many bytes. Raises LinkLost."""
        reply = Reply(max_bytes)
        if self.is_over:
            raise LinkLost("the connection is closed")
        try:
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream_id, headers)
        except h2.exceptions.ProtocolError as error:  # no streams are left, or too many are open
            raise LinkLost("it takes no more calls on this connection") from error
        self._replies[stream_id] = reply
        try:
            await self._send(stream_id, parts, reply)
            await reply.ended.wait()
        except h2.exceptions.ProtocolError as error:
            raise LinkLost("the connection ended") from error
        finally:
            del self._replies[stream_id]
            if not reply.ended.is_set():  # cancelled: the door should stop, too
                self._reset(stream_id, h2.errors.ErrorCodes.CANCEL)
        if reply.failure is not None:
            raise LinkLost(reply.failure)
        return reply

    async def _send(self, stream_id: int, parts: Sequence[Payload], reply: Reply) -> None:
        for part in parts:
            view = memoryview(part)
            while view and not reply.ended.is_set():  # it may be answered before it is sent
                size = min(len(view), self._room(stream_id))
                if size <= 0:
                    await self._wait()
                    continue
                self._h2.send_data(stream_id, view[:size])
                self._num_unsent += size
                self._due.set()
                view = view[size:]
        if reply.ended.is_set():
            self._reset(stream_id, h2.errors.ErrorCodes.NO_ERROR)
        else:
            self._h2.end_stream(stream_id)
            self._due.set()

    def _room(self, stream_id: int) -> int:
        if self._num_unsent >= _MAX_UNSENT_BYTES:
            return 0
        window = self._h2.local_flow_control_window(stream_id)
        return min(window, self._h2.max_outbound_frame_size, FRAME_BYTES)

    def _reset(self, stream_id: int, code: h2.errors.ErrorCodes) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self._h2.reset_stream(stream_id, code)
            self._due.set()

    async def _wait(self) -> None:
        self._due.set()
        await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _write(self) -> None:
        while True:
            await self._due.wait()
            self._due = trio.Event()
            data = self._h2.data_to_send()
            self._num_unsent = 0
            if data:
                await self._stream.send_all(data)
            self._tell()

    async def _read(self) -> None:
        while data := await self._stream.receive_some(_READ_BYTES):
            for event in self._h2.receive_data(bytes(data)):
                self._take(event)
            self._due.set()
            self._tell()
            if self.is_over:
                return

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            self.is_over = True
        stream_id = getattr(event, "stream_id", None)
        if isinstance(event, h2.events.DataReceived):
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        reply = self._replies.get(stream_id or 0)
        if reply is None:
            return
        if isinstance(event, h2.events.ResponseReceived):
            reply.headers = _text(event.headers)
        elif isinstance(event, h2.events.TrailersReceived):
            reply.trailers = _text(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            reply.body += event.data
            if len(reply.body) > reply.max_bytes:
                self._reset(event.stream_id, h2.errors.ErrorCodes.CANCEL)
                reply.end("its answer is larger than a message may be")
        elif isinstance(event, h2.events.StreamEnded):
            reply.end()
        elif isinstance(event, h2.events.StreamReset):
            reply.end("it gave the call up")


def _text(headers: object) -> dict[str, str]:
    pairs = headers if isinstance(headers, list) else []
    return {str(name): str(value) for name, value in pairs}
