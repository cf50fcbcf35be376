"""Doors whose handler echoes, served on loopback."""

import contextlib
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pipeline.doors.listening import DoorServer, Listening, listen
from pipeline.doors.messages import AttestResponse, InferResponse

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


@pytest.fixture(scope="session")
def shown_key():
    """What the door attests to."""
    return KEY


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Paths of a certificate for 127.0.0.1, which is its own authority, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "door")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    directory = tmp_path_factory.mktemp("tls")
    (directory / "door.crt").write_bytes(made.public_bytes(Encoding.PEM))
    (directory / "door.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return directory / "door.crt", directory / "door.key"


@dataclass
class Served:
    door: EchoDoor
    grpc: int
    http: int


@pytest.fixture
def echo_door():
    return EchoDoor()


@pytest.fixture
def serve_door():
    @contextlib.asynccontextmanager
    async def serve(
        door=None,
        tls_grpc: ssl.SSLContext | None = None,
        tls_http: ssl.SSLContext | None = None,
        port_grpc=0,
        port_http=0,
    ):
        door = door or EchoDoor()
        grpc = await listen("127.0.0.1", port_grpc)
        http = await listen("127.0.0.1", port_http)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                DoorServer(door).serve, Listening(grpc, tls_grpc), Listening(http, tls_http)
            )
            try:
                yield Served(door, grpc[0].socket.getsockname()[1], http[0].socket.getsockname()[1])
            finally:
                nursery.cancel_scope.cancel()

    return serve
