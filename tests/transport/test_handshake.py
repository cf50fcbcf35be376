"""The handshake: agreement, and the refusal of everything that is not exactly the agreement."""

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import handshake, noise
from transport.attestation.evidence_binding import Binding, EvidenceKind
from transport.attestation.key_only import KeyOnlyAttester, KeyOnlyVerifier
from transport.errors import AttestationError, HandshakeError, MisuseError, ProtocolError
from transport.records import RecordKind
from transport.rekey_policy import RekeyPolicy


def run_with(toy, alter, link=None, peer_link=None):
    """Run a handshake whose message number n travels through alter(n, message)."""
    link = link or toy.link()
    awaiting_reply, hello = handshake.initiate(link, toy.credentials())
    awaiting_hello = handshake.respond(peer_link or link, toy.credentials())
    awaiting_proof, reply = awaiting_hello.receive(alter(0, hello)).answer()
    awaiting_accept, proof = awaiting_reply.receive(alter(1, reply))
    session, accept = awaiting_proof.receive(alter(2, proof))
    return awaiting_accept.receive(alter(3, accept)), session


def test_both_sides_agree_on_keys_hash_roles_and_evidence(toy):
    initiator, responder, _ = toy.sessions()
    assert initiator.handshake_hash == responder.handshake_hash
    assert initiator.peer.role == toy.STAGE_1
    assert responder.peer.role == toy.STAGE_0
    assert initiator.peer.attested.kind is EvidenceKind.DEV
    for sender, receiver in ((initiator, responder), (responder, initiator)):
        record = sender.sealer.seal(RecordKind.FRAME, b"tensor")
        assert receiver.opener.open(record) == (RecordKind.FRAME, b"tensor")


@pytest.mark.parametrize("number", range(4))
def test_flipping_any_bit_of_any_byte_of_a_message_is_rejected(toy, number):
    size = len(toy.sessions()[2][number])
    for position in range(size):
        bit = 1 << (position % 8)

        def flip(n, message, position=position, bit=bit):
            if n != number:
                return message
            return message[:position] + bytes([message[position] ^ bit]) + message[position + 1 :]

        with pytest.raises(ProtocolError):
            run_with(toy, flip)


@pytest.mark.parametrize("number", range(4))
def test_every_truncation_and_extension_of_a_message_is_rejected(toy, number):
    size = len(toy.sessions()[2][number])
    for length in [*range(size), size + 1, size + 100]:

        def resize(n, message, length=length):
            return message if n != number else (message + bytes(100))[:length]

        with pytest.raises(ProtocolError):
            run_with(toy, resize)


LINK_CHANGES = {
    "another manifest": {"manifest_hash": hashlib.sha256(b"other").digest()},
    "another kind of link": {"kind": handshake.LinkKind.CONTROL},
    "another epoch": {"epoch": b"\x08" * 16},
    "another stage": {"responder": handshake.Role(handshake.RoleKind.STAGE, 2)},
    "another role": {"initiator": handshake.Role(handshake.RoleKind.ORCHESTRATOR)},
}


@pytest.mark.parametrize("name", LINK_CHANGES)
def test_a_peer_set_up_for_another_link_is_rejected_with_a_reason(toy, name):
    peer_link = toy.link(**LINK_CHANGES[name])
    with pytest.raises(HandshakeError) as caught:
        run_with(toy, lambda _, message: message, peer_link=peer_link)
    assert peer_link.manifest_hash.hex()[:16] in str(caught.value)
    assert "another manifest" in str(caught.value)
    assert "another stage or role" in str(caught.value)


@pytest.mark.parametrize("name", LINK_CHANGES)
def test_nothing_is_proved_and_no_key_is_touched_for_a_stranger(toy, name, monkeypatch):
    def spend(*_):
        pytest.fail("work for a stranger")

    class Spender(toy.Attester):
        attest = spend

    _, hello = handshake.initiate(toy.link(**LINK_CHANGES[name]), toy.credentials())
    responder = toy.credentials(attester=Spender())
    monkeypatch.setattr(noise.HandshakeState, "_mix_secret", spend)
    with pytest.raises(HandshakeError):
        handshake.respond(toy.link(), responder).receive(hello)


def test_a_mark_is_good_for_its_own_key_alone(toy):
    hellos = [handshake.initiate(toy.link(), toy.credentials())[1] for _ in range(2)]
    crossed = hellos[0][:32] + hellos[1][32:]
    with pytest.raises(HandshakeError, match="another link"):
        handshake.respond(toy.link(), toy.credentials()).receive(crossed)


def test_the_bytes_of_a_hello_are_those_of_the_specification(toy):
    _, hello = handshake.initiate(toy.link(), toy.credentials())
    name = b"Noise_XX_25519_ChaChaPoly_SHA256"
    h = hashlib.sha256(name + b"veilpipe/2" + name + toy.link().prologue()[42:]).digest()
    h = hashlib.sha256(h + hello[:32]).digest()
    assert hello[32:] == hmac.digest(h, b"veilpipe-hello/2", "sha256")[:16]


def test_links_have_distinct_prologues(toy):
    links = [toy.link(), *(toy.link(**change) for change in LINK_CHANGES.values())]
    links.append(toy.link(initiator=toy.STAGE_1, responder=toy.STAGE_0))
    assert len({link.prologue() for link in links}) == len(links)


def test_reflected_first_message_does_not_authenticate_ourselves(toy):
    awaiting_reply, hello = handshake.initiate(toy.link(), toy.credentials())
    with pytest.raises(HandshakeError):
        awaiting_reply.receive((hello * 10)[: handshake.REPLY_SIZES[0]])


def test_a_peer_with_our_own_static_key_is_refused_by_both_sides(toy):
    shared = X25519PrivateKey.generate()
    ours, theirs = toy.credentials(static_key=shared), toy.credentials(static_key=shared)
    awaiting_reply, hello = handshake.initiate(toy.link(), ours)
    _, reply = handshake.respond(toy.link(), theirs).receive(hello).answer()
    with pytest.raises(HandshakeError, match="our own key"):
        awaiting_reply.receive(reply)


def test_evidence_of_another_handshake_is_refused(toy):
    class Replayer:
        kind = EvidenceKind.DEV
        document = toy.Attester().attest(Binding(b"stage/1", b"h" * 32, b"s" * 32, b"n" * 32))

        def attest(self, binding):
            return self.document

    awaiting_reply, hello = handshake.initiate(toy.link(), toy.credentials())
    replayer = toy.credentials(attester=Replayer())
    _, reply = handshake.respond(toy.link(), replayer).receive(hello).answer()
    with pytest.raises(AttestationError) as caught:
        awaiting_reply.receive(reply)
    assert caught.value.check == "user_data"


@pytest.mark.parametrize("prover_is_initiator", [True, False])
def test_a_kind_of_evidence_outside_local_policy_is_refused(toy, prover_is_initiator):
    weak = toy.credentials(attester=KeyOnlyAttester())
    strict = toy.credentials()
    initiator, responder = (weak, strict) if prover_is_initiator else (strict, weak)
    awaiting_reply, hello = handshake.initiate(toy.link(), initiator)
    awaiting_proof, reply = handshake.respond(toy.link(), responder).receive(hello).answer()
    with pytest.raises(AttestationError, match="KEY_ONLY; accepted here: DEV"):
        awaiting_proof.receive(awaiting_reply.receive(reply)[1])


def test_key_only_evidence_admits_the_listed_key_alone(toy):
    host, enclave = X25519PrivateKey.generate(), toy.credentials()
    listed = host.public_key().public_bytes_raw()
    for allowed, is_admitted in ((listed, True), (bytes(32), False)):
        initiator = toy.credentials(static_key=host, attester=KeyOnlyAttester())
        verifier = KeyOnlyVerifier(frozenset({allowed}))
        responder = toy.credentials(static_key=enclave.static_key, verifiers=(verifier,))
        awaiting_reply, hello = handshake.initiate(toy.link(), initiator)
        awaiting_proof, reply = handshake.respond(toy.link(), responder).receive(hello).answer()
        awaiting_accept, proof = awaiting_reply.receive(reply)
        if is_admitted:
            session, accept = awaiting_proof.receive(proof)
            assert session.peer.static_key == listed
            assert awaiting_accept.receive(accept).peer.role == toy.STAGE_1
        else:
            with pytest.raises(AttestationError):
                awaiting_proof.receive(proof)


def test_evidence_is_bound_to_prover_role_key_and_the_verifiers_ephemeral_key(toy):
    seen = []

    class Recorder(toy.Attester):
        def attest(self, binding):
            seen.append(binding)
            return super().attest(binding)

    ours, theirs = (toy.credentials(attester=Recorder()) for _ in range(2))
    awaiting_reply, hello = handshake.initiate(toy.link(), ours)
    awaiting_proof, reply = handshake.respond(toy.link(), theirs).receive(hello).answer()
    awaiting_proof.receive(awaiting_reply.receive(reply)[1])
    by_responder, by_initiator = seen
    assert (by_responder.role, by_initiator.role) == (b"stage/1", b"stage/0")
    assert by_responder.nonce == hello[:32]
    assert by_initiator.nonce == reply[:32]
    assert by_responder.static_key == theirs.static_key.public_key().public_bytes_raw()
    assert by_initiator.static_key == ours.static_key.public_key().public_bytes_raw()
    assert by_responder.handshake_hash != by_initiator.handshake_hash


def test_a_phase_works_once_whether_it_succeeded_or_failed(toy):
    awaiting_reply, hello = handshake.initiate(toy.link(), toy.credentials())
    awaiting_hello = handshake.respond(toy.link(), toy.credentials())
    _, reply = awaiting_hello.receive(hello).answer()
    with pytest.raises(MisuseError):
        awaiting_hello.receive(hello).answer()
    with pytest.raises(HandshakeError):
        awaiting_reply.receive(reply[:-1] + bytes([reply[-1] ^ 1]))
    with pytest.raises(MisuseError):
        awaiting_reply.receive(reply)


def test_the_first_record_must_be_accept(toy):
    awaiting_reply, hello = handshake.initiate(toy.link(), toy.credentials())
    awaiting_proof, reply = handshake.respond(toy.link(), toy.credentials()).receive(hello).answer()
    awaiting_accept, proof = awaiting_reply.receive(reply)
    side = awaiting_proof._side
    session = side.session(side.read_evidence(proof))
    with pytest.raises(ProtocolError, match="CLOSE, not ACCEPT"):
        awaiting_accept.receive(session.sealer.seal(RecordKind.CLOSE))


def test_evidence_over_the_limit_is_neither_sent_nor_taken(toy):
    class Verbose(toy.Attester):
        def attest(self, binding):
            return bytes(handshake.MAX_EVIDENCE_BYTES + 1)

    _, hello = handshake.initiate(toy.link(), toy.credentials())
    with pytest.raises(MisuseError):
        handshake.respond(toy.link(), toy.credentials(attester=Verbose())).receive(hello).answer()
    most = handshake.REPLY_SIZES[1]
    prefix = handshake.LENGTH.pack(most + 1)
    with pytest.raises(HandshakeError, match="does not speak veilpipe/2"):
        handshake.message_size_untrusted(prefix, handshake.REPLY_SIZES, toy.link())


@pytest.mark.parametrize(
    "make",
    [
        lambda toy: toy.link(manifest_hash=b"short"),
        lambda toy: toy.link(epoch=b"short"),
        lambda toy: toy.link(responder=toy.STAGE_0),
        lambda toy: handshake.Role(handshake.RoleKind.ORCHESTRATOR, 1),
        lambda toy: handshake.Role(handshake.RoleKind.STAGE, -1),
        lambda toy: RekeyPolicy(max_records=0),
        lambda toy: RekeyPolicy(max_records=2**63),
        lambda toy: RekeyPolicy(max_bytes=2**63),
    ],
)
def test_a_link_that_cannot_be_is_misuse(toy, make):
    with pytest.raises(MisuseError):
        make(toy)


@settings(max_examples=60)
@given(message=st.binary(max_size=400))
def test_arbitrary_messages_raise_protocol_errors_only(toy, message):
    awaiting_reply, hello = handshake.initiate(toy.link(), toy.credentials())
    with pytest.raises(ProtocolError):
        awaiting_reply.receive(message)
    awaiting_hello = handshake.respond(toy.link(), toy.credentials())
    try:
        awaiting_proof, _ = awaiting_hello.receive(message)
    except ProtocolError:
        awaiting_proof, _ = handshake.respond(toy.link(), toy.credentials()).receive(hello).answer()
    with pytest.raises(ProtocolError):
        awaiting_proof.receive(message)


@given(payload=st.binary(max_size=200))
def test_arbitrary_evidence_payloads_raise_protocol_errors_only(toy, payload):
    binding = Binding(b"stage/1", b"h" * 32, b"s" * 32, b"n" * 32)
    with pytest.raises(AttestationError):
        handshake.check_evidence_untrusted(payload, (toy.Verifier(),), binding)
