"""Links, credentials and connected pairs for the transport tests."""

import gc
import hashlib
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.transport.relayed import LOOPBACK, Running
from transport import channel, compiled_records, handshake, record_counters
from transport.attestation.evidence_binding import Attested, EvidenceKind, user_data
from transport.channel import accept_channel, connect_channel
from transport.errors import AttestationError
from transport.tensor_frames import DType, Frame, FrameKind, FrameLimits, Tensor, TensorSpec

ORCHESTRATOR = handshake.Role(handshake.RoleKind.ORCHESTRATOR)
STAGE_0 = handshake.Role(handshake.RoleKind.STAGE, 0)
STAGE_1 = handshake.Role(handshake.RoleKind.STAGE, 1)


class ToyAttester:
    """A document that repeats the whole binding, so that a verifier can check each part."""

    kind = EvidenceKind.DEV

    def attest(self, binding):
        return user_data(binding) + binding.static_key + binding.nonce


class ToyVerifier:
    kind = EvidenceKind.DEV

    def verify(self, evidence, binding):
        expected = (user_data(binding), binding.static_key, binding.nonce)
        shown = (evidence[:48], evidence[48:80], evidence[80:])
        for name, got, wanted in zip(("user_data", "key", "nonce"), shown, expected, strict=True):
            if got != wanted:
                raise AttestationError(name, "differs")
        return Attested(self.kind, {0: b"\1" * 48})


def make_credentials(**changes):
    fields = {
        "static_key": X25519PrivateKey.generate(),
        "attester": ToyAttester(),
        "verifiers": (ToyVerifier(),),
    }
    return handshake.Credentials(**(fields | changes))


def make_link(**changes):
    fields = {
        "kind": handshake.LinkKind.DATA,
        "initiator": STAGE_0,
        "responder": STAGE_1,
        "manifest_hash": hashlib.sha256(b"manifest").digest(),
        "epoch": b"\7" * 16,
    }
    return handshake.Link(**(fields | changes))


def make_sessions(link=None, peer_link=None, rekey=None):
    """Run the handshake in memory; returns both sessions and the four messages."""
    link = link or make_link()
    awaiting_reply, hello = handshake.initiate(link, make_credentials(), rekey)
    awaiting_hello = handshake.respond(peer_link or link, make_credentials(), rekey)
    awaiting_proof, reply = awaiting_hello.receive(hello).answer()
    awaiting_accept, proof = awaiting_reply.receive(reply)
    responder, accept = awaiting_proof.receive(proof)
    return awaiting_accept.receive(accept), responder, (hello, reply, proof, accept)


LIMITS = FrameLimits(max_header_bytes=1 << 17, max_tensors=8, max_tensor_bytes=1 << 26)


def make_frame(*sizes, header=b"header"):
    """A frame with one U8 tensor of each size."""
    tensors = tuple(
        Tensor(TensorSpec(DType.U8, (size,)), memoryview(os.urandom(size))) for size in sizes
    )
    return Frame(FrameKind.DATA, header, tensors)


def contents(frame):
    """What must be equal at both ends; also keeps a copy of what the next receive overwrites."""
    return frame.kind, frame.header, [(t.spec, bytes(t.data)) for t in frame.tensors]


def tcp_pair():
    """Two connected TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


async def make_channels(sockets=None, link=None, peer_link=None, rekey=None, limits=LIMITS):
    """An initiator's and a responder's channel over `sockets`."""
    near, far = sockets or tcp_pair()
    link = link or make_link()
    made = {}

    async def make(name, function, sock, own_link):
        made[name] = await function(sock, own_link, make_credentials(), limits, rekey=rekey)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make, "initiator", connect_channel, near, link)
        nursery.start_soon(make, "responder", accept_channel, far, peer_link or link)
    return made["initiator"], made["responder"]


async def close(*channels):
    for each in channels:
        await each.aclose()


def open_sockets():
    """The file descriptors of this process that are sockets."""
    gc.collect()
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if target.startswith("socket:"):
            found.add(target)
    return found


def without_compiled_records(monkeypatch):
    """Channels made from now on pass no single record through a compiled call."""
    monkeypatch.setattr(channel, "Inlet", compiled_records.PlainInlet)
    monkeypatch.setattr(channel, "Outlet", compiled_records.PlainOutlet)


@pytest.fixture(scope="session")
def toy(read_unit):
    """Everything above, by name."""
    return SimpleNamespace(
        ORCHESTRATOR=ORCHESTRATOR,
        STAGE_0=STAGE_0,
        STAGE_1=STAGE_1,
        Attester=ToyAttester,
        Verifier=ToyVerifier,
        credentials=make_credentials,
        link=make_link,
        sessions=make_sessions,
        LIMITS=LIMITS,
        frame=make_frame,
        contents=contents,
        tcp_pair=tcp_pair,
        channels=make_channels,
        close=close,
        open_sockets=open_sockets,
        read_unit=read_unit,
        without_compiled_records=without_compiled_records,
    )


@pytest.fixture(params=["compiled", "interpreted"])
def records_by(request, monkeypatch):
    """Channels that pass single records through the compiled functions, or do without them."""
    if request.param == "compiled" and not record_counters.IS_COMPILED:
        pytest.skip("transport._native is not compiled")
    if request.param == "interpreted":
        without_compiled_records(monkeypatch)
    return request.param


@pytest.fixture
def running(nursery):
    """Starts relays of one map; they and their targets close with the test."""
    started = []

    def start(listening=LOOPBACK, target=LOOPBACK, max_connections=8):
        started.append(Running(nursery, listening, target, max_connections))
        return started[-1]

    yield start
    for each in started:
        each.target.close()
        each.relay.close()
