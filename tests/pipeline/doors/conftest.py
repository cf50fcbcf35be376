"""Doors whose handler echoes, served on loopback."""

import contextlib
import ssl
from dataclasses import dataclass, field

import pytest
import trio

from pipeline.doors.listening import DoorServer, Listening, listen
from pipeline.doors.messages import AttestResponse, DoorError, InferResponse

KEY = AttestResponse(b"\x01" * 32, b"\x02" * 32, "dev", b"\x03" * 1000)


@dataclass
class EchoDoor:
    """Answers with what it got, and keeps it; `fault` is raised instead, `before` awaited first."""

    requests: list = field(default_factory=list)
    fault: Exception | None = None
    before: object = None
    num_cancelled: int = 0

    async def infer(self, request):
        self.requests.append(request)
        if self.before is not None:
            try:
                await self.before()
            except trio.Cancelled:
                self.num_cancelled += 1
                raise
        if self.fault is not None:
            raise self.fault
        return InferResponse(
            output=request.cloaked_embedding,
            shape=tuple(request.shape),
            dtype=request.dtype,
            tokens_processed=7,
            nonce=b"answer nonce",
        )

    async def attest(self, request):
        self.requests.append(request)
        if self.fault is not None:
            raise self.fault
        return KEY


@dataclass
class Served:
    door: EchoDoor
    grpc: int
    http: int


@pytest.fixture
def serve_door():
    @contextlib.asynccontextmanager
    async def serve(door=None, tls_grpc: ssl.SSLContext | None = None, tls_http=None):
        door = door or EchoDoor()
        grpc, http = await listen("127.0.0.1", 0), await listen("127.0.0.1", 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                DoorServer(door).serve, Listening(grpc, tls_grpc), Listening(http, tls_http)
            )
            try:
                yield Served(
                    door, grpc[0].socket.getsockname()[1], http[0].socket.getsockname()[1]
                )
            finally:
                nursery.cancel_scope.cancel()

    return serve
