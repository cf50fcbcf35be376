"""Compare SecureChannel with TLS 1.3 on loopback, interleaved, and print a markdown table.

Usage: python scripts/bench_channel.py [--rounds N]

Tensors go to a peer in a second process. Round trips run with both ends in one event loop, so that
they measure the work and not how long an idle core takes to wake. Every round measures each candidate once; the table shows the
median of the rounds and the median of the rounds' ratios, so that a noisy machine disturbs both
sides alike. A missed target is marked; the exit code is 1 then.
"""

import argparse
import datetime
import multiprocessing
import os
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transport import handshake
from transport.attestation.key_only import KeyOnlyAttester, KeyOnlyVerifier
from transport.channel import SecureChannel, accept_channel, connect_channel
from transport.frames import (
    DType,
    Frame,
    FrameKind,
    FrameLimits,
    Tensor,
    TensorSpec,
    decode_layout_untrusted,
    encode_frame,
)

SMALL_BYTES = 3072
LARGE_BYTES = 1_572_864
ROUND_TRIPS = 200
TRANSFERS = 24
HANDSHAKES = 40
LIMITS = FrameLimits(max_header_bytes=4096, max_tensors=4, max_tensor_bytes=4 * LARGE_BYTES)
LINK = handshake.Link(
    handshake.LinkKind.DATA,
    handshake.Role(handshake.RoleKind.STAGE, 0),
    handshake.Role(handshake.RoleKind.STAGE, 1),
    manifest_hash=bytes(32),
)


def make_credentials() -> tuple[handshake.Credentials, handshake.Credentials]:
    keys = [X25519PrivateKey.generate() for _ in range(2)]
    public = [key.public_key().public_bytes_raw() for key in keys]
    return tuple(
        handshake.Credentials(key, KeyOnlyAttester(), (KeyOnlyVerifier(frozenset({other})),))
        for key, other in zip(keys, reversed(public), strict=True)
    )


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


def make_frame(num_bytes: int) -> Frame:
    data = memoryview(os.urandom(num_bytes))
    tensor = Tensor(TensorSpec(DType.F32, (1, num_bytes // 4)), data)
    return Frame(FrameKind.DATA, b"h" * 40, (tensor,))


# --- the peer process: acknowledges every TRANSFERS large messages -------------------------------


async def serve_channel(listener: socket.socket, credentials: handshake.Credentials) -> None:
    channel = await accept_channel(accept(listener), LINK, credentials, LIMITS)
    num_large = 0
    async for _ in channel:
        num_large += 1
        if num_large % TRANSFERS == 0:
            await channel.send(Frame(FrameKind.DATA, b"ack"))
    await channel.aclose()


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


def accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def dial(listener: socket.socket) -> socket.socket:
    sock = socket.create_connection(listener.getsockname())
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


# --- the measured side ---------------------------------------------------------------------------


async def timed(
    action: Callable[[], Awaitable[object]],
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    started = clock()
    for _ in range(count):
        await action()
    return (clock() - started) / count


async def our_transfers(channel: SecureChannel, large: Frame) -> None:
    for _ in range(TRANSFERS):
        await channel.send(large)
    await channel.receive()


async def trio_transfers(stream: trio.SSLStream, large: bytes) -> None:
    await stream.send_all(b"l")
    for _ in range(TRANSFERS):
        await stream.send_all(large)
    await read_trio(stream, 3)


class FramesOverTls:
    """The same frames over trio.SSLStream, each behind a four-byte length."""

    def __init__(self, stream: trio.SSLStream) -> None:
        self.stream = stream

    async def send(self, frame: Frame) -> None:
        plain, _ = encode_frame(frame)
        await self.stream.send_all(len(plain).to_bytes(4, "big") + plain)

    async def receive(self) -> Frame:
        data = await self.stream.receive_some(LARGE_BYTES)
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
            data += await self.stream.receive_some(LARGE_BYTES)
        plain = memoryview(data)[4:]
        layout = decode_layout_untrusted(plain, LIMITS)
        header = bytes(plain[layout.header_start : layout.header_stop])
        pairs = zip(layout.specs, layout.places, strict=True)
        tensors = tuple(Tensor(spec, plain[start:stop]) for spec, (start, stop) in pairs)
        return Frame(layout.kind, header, tensors)


async def connected_channels(
    pair: tuple[handshake.Credentials, handshake.Credentials],
) -> tuple[SecureChannel, SecureChannel]:
    near, far = tcp_pair()
    made: list[SecureChannel] = []
    async with trio.open_nursery() as nursery:

        async def accept_one() -> None:
            made.append(await accept_channel(far, LINK, pair[1], LIMITS))

        nursery.start_soon(accept_one)
        channel = await connect_channel(near, LINK, pair[0], LIMITS)
    return channel, made[0]


def connected_tls(
    client: ssl.SSLContext, server: ssl.SSLContext
) -> tuple[trio.SSLStream, trio.SSLStream]:
    near, far = (trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in tcp_pair())
    return (
        trio.SSLStream(near, client, server_hostname="bench", https_compatible=True),
        trio.SSLStream(far, server, server_side=True, https_compatible=True),
    )


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return dial(listener), accept(listener)


@asynccontextmanager
async def round_trips(
    pair: tuple, client: ssl.SSLContext, server: ssl.SSLContext
) -> AsyncIterator[dict[str, Callable[[], Awaitable[object]]]]:
    """One action per candidate: a round trip to an echo in the same event loop."""
    frame, message = make_frame(SMALL_BYTES), os.urandom(SMALL_BYTES)
    ours, our_echo = await connected_channels(pair)
    bare, bare_echo = connected_tls(client, server)
    near, far = connected_tls(client, server)
    framed, framed_echo = FramesOverTls(near), FramesOverTls(far)

    async def echo_frames(end: SecureChannel | FramesOverTls) -> None:
        while True:
            await end.send(await end.receive())

    async def echo_bytes() -> None:
        while True:
            await bare_echo.send_all(await read_trio(bare_echo, SMALL_BYTES))

    async def frames_trip(end: SecureChannel | FramesOverTls) -> None:
        await end.send(frame)
        await end.receive()

    async def bytes_trip() -> None:
        await bare.send_all(message)
        await read_trio(bare, SMALL_BYTES)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_frames, our_echo)
        nursery.start_soon(echo_frames, framed_echo)
        nursery.start_soon(echo_bytes)
        yield {
            "rtt ours": lambda: frames_trip(ours),
            "rtt frames": lambda: frames_trip(framed),
            "rtt bytes": bytes_trip,
        }
        nursery.cancel_scope.cancel()
    for end in (ours, our_echo):
        await end.aclose()
    for stream in (bare, bare_echo, near, far):
        await trio.aclose_forcefully(stream)


def blocking_transfers(sock: ssl.SSLSocket, large: bytes) -> float:
    started = time.perf_counter()
    sock.sendall(b"l")
    for _ in range(TRANSFERS):
        sock.sendall(large)
    sock.recv(3)
    return (time.perf_counter() - started) / TRANSFERS


def our_handshake(credentials: tuple[handshake.Credentials, handshake.Credentials]) -> None:
    awaiting_reply, hello = handshake.initiate(LINK, credentials[0])
    awaiting_proof, reply = handshake.respond(LINK, credentials[1]).receive(hello)
    awaiting_accept, proof = awaiting_reply.receive(reply)
    _, accept_record = awaiting_proof.receive(proof)
    awaiting_accept.receive(accept_record)


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


def cpu_time(action: Callable[[], None]) -> float:
    started = time.process_time()
    for _ in range(HANDSHAKES):
        action()
    return (time.process_time() - started) / HANDSHAKES


# --- rounds and table ----------------------------------------------------------------------------


def serve(
    listeners: list[socket.socket], certificate: Path, credentials: handshake.Credentials
) -> None:
    """Serve in one process each: they never run at the same time."""
    _, server_context = tls_contexts(certificate)
    ours, trio_tls, blocking = listeners
    for target in (
        lambda: trio.run(serve_channel, ours, credentials),
        lambda: trio.run(serve_trio_tls, trio_tls, server_context),
        lambda: serve_blocking_tls(blocking, server_context),
    ):
        multiprocessing.get_context("fork").Process(target=target, daemon=True).start()


async def measure(
    num_rounds: int, listeners: list[socket.socket], certificate: Path, pair: tuple
) -> dict[str, list[float]]:
    client_context, server_context = tls_contexts(certificate)
    ours = await connect_channel(dial(listeners[0]), LINK, pair[0], LIMITS)
    raw = trio.SocketStream(trio.socket.from_stdlib_socket(dial(listeners[1])))
    stream = trio.SSLStream(raw, client_context, server_hostname="bench", https_compatible=True)
    blocking = client_context.wrap_socket(dial(listeners[2]), server_hostname="bench")
    large, large_frame = os.urandom(LARGE_BYTES), make_frame(LARGE_BYTES)
    results: dict[str, list[float]] = {}
    async with round_trips(pair, client_context, server_context) as trips:
        for round_number in range(num_rounds + 1):
            row = {
                name: await timed(trip, ROUND_TRIPS, time.process_time)
                for name, trip in trips.items()
            }
            row |= {
                "bulk ours": await timed(lambda: our_transfers(ours, large_frame), 1) / TRANSFERS,
                "bulk blocking": blocking_transfers(blocking, large),
                "bulk trio": await timed(lambda: trio_transfers(stream, large), 1) / TRANSFERS,
                "handshake ours": cpu_time(lambda: our_handshake(pair)),
                "handshake tls": cpu_time(lambda: tls_handshake(client_context, server_context)),
            }
            if round_number:  # the first warms everything up
                for name, value in row.items():
                    results.setdefault(name, []).append(value)
    await ours.aclose()
    await stream.aclose()
    blocking.close()
    return results


def report(results: dict[str, list[float]], cipher: str) -> bool:
    """Print the table; returns whether every target is met."""
    rows = [
        ("3 KB round trip, CPU", "rtt ours", "frames on trio.SSLStream", "rtt frames", 0.5, False),
        (
            "3 KB round trip, CPU",
            "rtt ours",
            "bare bytes on trio.SSLStream",
            "rtt bytes",
            0.5,
            False,
        ),
        ("1.5 MB tensor", "bulk ours", "blocking TLS", "bulk blocking", 1.3, True),
        ("1.5 MB tensor", "bulk ours", "trio.SSLStream", "bulk trio", 2.3, True),
        ("handshake, CPU of both sides", "handshake ours", "TLS", "handshake tls", 0.7, False),
    ]
    print(f"\nTLS is {cipher}; medians of {len(results['rtt ours'])} interleaved rounds.\n")
    print("| what | ours µs | against | its µs | ratio | target | met |")
    print("|---|---:|---|---:|---:|---|---|")
    all_met = True
    for what, ours, against, theirs, target, is_speedup in rows:
        pairs = zip(results[ours], results[theirs], strict=True)
        ratio = median(b / a if is_speedup else a / b for a, b in pairs)
        met = ratio >= target if is_speedup else ratio <= target
        all_met &= met
        unit = "x throughput" if is_speedup else "x time"
        sign = "≥" if is_speedup else "≤"
        ours_us, theirs_us = (median(results[name]) * 1e6 for name in (ours, theirs))
        print(
            f"| {what} | {ours_us:.0f} | {against} | {theirs_us:.0f} | {ratio:.2f}{unit} "
            f"| {sign} {target} | {'yes' if met else '**no**'} |"
        )
    return all_met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    num_rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:
        certificate = write_certificate(Path(directory))
        pair = make_credentials()
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        serve(listeners, certificate, pair[1])
        results = trio.run(measure, num_rounds, listeners, certificate, pair)
        for listener in listeners:
            listener.close()
    return 0 if report(results, "TLS 1.3 as Python negotiates it") else 1


if __name__ == "__main__":
    sys.exit(main())
