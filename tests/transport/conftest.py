"""Links, credentials and connected pairs for the transport tests."""

import hashlib
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from transport import handshake
from transport.attestation.evidence import Attested, EvidenceKind, user_data
from transport.errors import AttestationError

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
    awaiting_proof, reply = awaiting_hello.receive(hello)
    awaiting_accept, proof = awaiting_reply.receive(reply)
    responder, accept = awaiting_proof.receive(proof)
    return awaiting_accept.receive(accept), responder, (hello, reply, proof, accept)


@pytest.fixture(scope="session")
def toy():
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
    )
