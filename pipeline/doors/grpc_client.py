"""A door behind gRPC, as its client has it."""

import math
import ssl
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote

import trio

from pipeline.doors.call import MAX_MESSAGE_BYTES
from pipeline.doors.faults import GrpcStatus, fault_named
from pipeline.doors.grpc_app import FAULT_TRAILER, KEY_TRAILER, PREFIX, SERVICE
from pipeline.doors.http2_link import Http2Link, LinkLost, Reply, Stream
from pipeline.doors.messages import (
    AttestRequest,
    AttestResponse,
    DoorError,
    DoorFault,
    InferRequest,
    InferResponse,
)
from pipeline.doors.peer import brief, reading_answers_of, unreachable
from pipeline.doors.protobuf import (
    decode_attest_response_untrusted,
    decode_infer_response_untrusted,
    encode,
)
from pipeline.errors import SessionError
from pipeline.tasks import open_tasks

_SMALL_FIELDS_BYTES = 64 << 10  # room for a request's other fields beside the embedding
_MAX_TIMEOUT_MS = 99_999_999  # what its eight digits can say


class GrpcDoor:
    """Calls share a connection, which is made when it is needed, and anew after it was lost.

    Raises of its calls: DoorError where the door refuses, SessionError where it is not reached or
    does not keep to the protocol; whether to try again is the caller's to know.
    """

    max_body_bytes = MAX_MESSAGE_BYTES - _SMALL_FIELDS_BYTES

    def __init__(
        self, nursery: trio.Nursery, host: str, port: int, tls: ssl.SSLContext | None
    ) -> None:
        self._nursery = nursery
        self._host = host
        self._port = port
        self._tls = tls
        self._authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._name = f"the door at {self._authority}"
        self._link: Http2Link | None = None
        self._dialing = trio.Lock()

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run one step of a session."""
        body = await self._call("Infer", request)
        with reading_answers_of(self._name):
            return decode_infer_response_untrusted(body)

    async def attest(self, request: AttestRequest) -> AttestResponse:
        """Show which key to seal to."""
        body = await self._call("Attest", request)
        with reading_answers_of(self._name):
            return decode_attest_response_untrusted(body)

    async def _call(self, method: str, request: InferRequest | AttestRequest) -> memoryview:
        parts = encode(request)
        num_bytes = sum(map(len, parts))
        if num_bytes > MAX_MESSAGE_BYTES:
            raise DoorError(DoorFault.TOO_LARGE, f"a request has at most {MAX_MESSAGE_BYTES} bytes")
        link = await self._connected()
        try:
            reply = await link.call(
                [
                    (":method", "POST"),
                    (":scheme", "https" if self._tls else "http"),
                    (":authority", self._authority),
                    (":path", SERVICE + method),
                    ("te", "trailers"),
                    ("content-type", "application/grpc"),
                    *_timeout(),
                ],
                [PREFIX.pack(0, num_bytes), *parts],
                MAX_MESSAGE_BYTES + PREFIX.size,
            )
        except LinkLost as error:
            raise SessionError(f"{self._name} is lost: {error}") from error
        return self._message(reply)

    async def _connected(self) -> Http2Link:
        async with self._dialing:
            if self._link is None or self._link.is_over:
                self._link = Http2Link(await self._dial())
                self._nursery.start_soon(self._link.run)
            return self._link

    async def _dial(self) -> Stream:
        try:
            stream = await trio.open_tcp_stream(self._host, self._port)
            return stream if self._tls is None else await self._secure(stream, self._tls)
        except (OSError, UnicodeError, trio.BrokenResourceError) as error:
            raise unreachable(self._name, error) from error

    async def _secure(self, stream: trio.SocketStream, tls: ssl.SSLContext) -> Stream:
        secured = trio.SSLStream(stream, tls, server_hostname=self._host, https_compatible=True)
        try:
            await secured.do_handshake()
            if secured.selected_alpn_protocol() != "h2":
                raise SessionError(f"{self._name} does not speak gRPC: TLS agreed on no HTTP/2")
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return secured

    def _message(self, reply: Reply) -> memoryview:
        """The answer's only message. Raises DoorError, SessionError."""
        trailers = reply.trailers or reply.headers
        if reply.headers.get(":status") != "200" or "grpc-status" not in trailers:
            status = brief(reply.headers.get(":status", "nothing"))
            raise SessionError(f"{self._name} does not speak gRPC: it answers {status}")
        if trailers["grpc-status"] != str(int(GrpcStatus.OK)):
            raise self._refusal(trailers)
        view = memoryview(reply.body)
        if len(view) < PREFIX.size or PREFIX.unpack(view[: PREFIX.size]) != (
            False,
            len(view) - PREFIX.size,
        ):
            raise SessionError(f"{self._name} answers what is no message")
        return view[PREFIX.size :]

    def _refusal(self, trailers: dict[str, str]) -> DoorError | SessionError:
        message = brief(unquote(trailers.get("grpc-message", "")))
        fault = fault_named(trailers.get(FAULT_TRAILER))
        if fault is None:
            code = trailers["grpc-status"]
            names = {str(int(status)): status.name for status in GrpcStatus}
            return SessionError(f"{self._name} fails: {names.get(code, brief(code))} {message}")
        return DoorError(fault, message, self._key(trailers.get(KEY_TRAILER)))

    def _key(self, text: str | None) -> AttestResponse | None:
        if text is None:
            return None
        with reading_answers_of(self._name):
            try:
                encoded = b64decode(text + "=" * (-len(text) % 4), validate=True)
            except ValueError as error:
                raise DoorError(DoorFault.INVALID, "its key is not base64") from error
            return decode_attest_response_untrusted(encoded)


def _timeout() -> list[tuple[str, str]]:
    """The deadline of whoever calls, for the door to know as well."""
    seconds = trio.current_effective_deadline() - trio.current_time()
    if math.isinf(seconds):
        return []
    return [("grpc-timeout", f"{min(max(1, math.ceil(seconds * 1000)), _MAX_TIMEOUT_MS)}m")]


@asynccontextmanager
async def open_grpc_door(
    host: str, port: int, tls: ssl.SSLContext | None
) -> AsyncIterator[GrpcDoor]:
    """The door at that address; its first call connects."""
    if tls is not None:
        tls.set_alpn_protocols(["h2"])
    async with open_tasks() as tasks:
        yield GrpcDoor(tasks, host, port, tls)
        tasks.cancel_scope.cancel()
