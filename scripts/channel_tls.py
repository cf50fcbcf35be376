"""The load of bench_channel.py, and TLS 1.3 that carries it: through trio, and blocking."""

import datetime
import socket
import ssl
import time
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from transport.tensor_frames import (
    Frame,
    FrameLimits,
    Tensor,
    decode_layout_untrusted,
    encode_frame,
)

SMALL_BYTES = 3072
LARGE_BYTES = 1_572_864
TRANSFERS = 24  # of large messages, each time acknowledged
LIMITS = FrameLimits(max_header_bytes=4096, max_tensors=4, max_tensor_bytes=4 * LARGE_BYTES)


def write_certificate(directory: Path) -> Path:
    """A self-signed P-256 certificate and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("bench")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "bench.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def tls_contexts(certificate: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Client and server contexts: TLS 1.3, both sides with certificates."""
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate)
        context.load_verify_locations(certificate)
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    contexts[1].num_tickets = 0  # no resumption here: leave tickets out of the handshake
    return contexts[0], contexts[1]


def tls_handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname="bench"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while sides:
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                pass


# --- the peer process: acknowledges every TRANSFERS large messages -------------------------------


def accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


async def serve_trio_tls(listener: socket.socket, context: ssl.SSLContext) -> None:
    raw = trio.SocketStream(trio.socket.from_stdlib_socket(accept(listener)))
    stream = trio.SSLStream(raw, context, server_side=True, https_compatible=True)
    while await stream.receive_some(1):
        await read_trio(stream, LARGE_BYTES * TRANSFERS)
        await stream.send_all(b"ack")
    await stream.aclose()


async def read_trio(stream: trio.SSLStream, num_bytes: int) -> bytes:
    """Read a message the way an application has to: a length known, into one buffer."""
    buffer = bytearray(min(num_bytes, LARGE_BYTES))
    done = 0
    while done < num_bytes:
        piece = await stream.receive_some(min(num_bytes - done, LARGE_BYTES))
        start = done % len(buffer)
        fits = min(len(piece), len(buffer) - start)
        buffer[start : start + fits] = piece[:fits]
        done += len(piece)
    return buffer


def serve_blocking_tls(listener: socket.socket, context: ssl.SSLContext) -> None:
    raw = accept(listener)
    with context.wrap_socket(raw, server_side=True) as sock:
        buffer = memoryview(bytearray(LARGE_BYTES))
        while sock.recv(1):
            for _ in range(TRANSFERS):
                done = 0
                while done < LARGE_BYTES:
                    done += sock.recv_into(buffer[done:])
            sock.sendall(b"ack")


# --- the measured side ---------------------------------------------------------------------------


def blocking_transfers(sock: ssl.SSLSocket, large: bytes) -> float:
    started = time.perf_counter()
    sock.sendall(b"l")
    for _ in range(TRANSFERS):
        sock.sendall(large)
    sock.recv(3)
    return (time.perf_counter() - started) / TRANSFERS


async def trio_transfers(stream: trio.SSLStream, large: bytes) -> None:
    await stream.send_all(b"l")
    for _ in range(TRANSFERS):
        await stream.send_all(large)
    await read_trio(stream, 3)


class BytesOverTls:
    """Messages of a size known beforehand: the least that trio.SSLStream can do."""

    def __init__(self, stream: trio.SSLStream) -> None:
        self.stream = stream

    async def send(self, message: bytes) -> None:
        await self.stream.send_all(message)

    async def receive(self) -> bytes:
        return await read_trio(self.stream, SMALL_BYTES)


class FramesOverTls:
    """The same frames over trio.SSLStream, each behind a four-byte length."""

    def __init__(self, stream: trio.SSLStream) -> None:
        self.stream = stream
        self.fixed, self.layout = b"", None  # remembered, as a SecureChannel does

    async def send(self, frame: Frame) -> None:
        plain, _ = encode_frame(frame)
        await self.stream.send_all(len(plain).to_bytes(4, "big") + plain)

    async def receive(self) -> Frame:
        data = await self.stream.receive_some(LARGE_BYTES)
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
            data += await self.stream.receive_some(LARGE_BYTES)
        plain = memoryview(data)[4:]
        layout = self.layout
        if layout is None or plain[: len(self.fixed)] != self.fixed:
            self.layout = layout = decode_layout_untrusted(plain, LIMITS)
            self.fixed = bytes(plain[: layout.header_start])
        header = bytes(plain[layout.header_start : layout.header_stop])
        views = [plain[start:stop] for start, stop in layout.places]
        return Frame(layout.kind, header, tuple(map(Tensor, layout.specs, views)))
