import hashlib

import pytest

from transport.attestation.evidence_binding import Binding, EvidenceKind, user_data
from transport.attestation.key_only import KeyOnlyAttester, KeyOnlyVerifier
from transport.errors import AttestationError, MisuseError


def test_user_data_hashes_context_prefixed_role_and_handshake(binding):
    expected = hashlib.sha384(b"veilpipe-attest/1" + b"\x07stage/1" + b"h" * 32).digest()
    assert user_data(binding) == expected


def test_user_data_tells_roles_and_handshakes_apart(binding):
    others = [
        Binding(b"stage/2", binding.handshake_hash, binding.static_key, binding.nonce),
        Binding(b"stage/1h", binding.handshake_hash, binding.static_key, binding.nonce),
        Binding(binding.role, b"H" * 32, binding.static_key, binding.nonce),
    ]
    assert len({user_data(b) for b in [binding, *others]}) == 4


@pytest.mark.parametrize(
    "fields",
    [
        (b"", b"h" * 32, b"s" * 32, b"n" * 32),
        (b"r" * 256, b"h" * 32, b"s" * 32, b"n" * 32),
        (b"r", b"h" * 31, b"s" * 32, b"n" * 32),
        (b"r", b"h" * 32, b"s" * 33, b"n" * 32),
        (b"r", b"h" * 32, b"s" * 32, b""),
    ],
)
def test_binding_of_wrong_lengths_is_misuse(fields):
    with pytest.raises(MisuseError):
        Binding(*fields)


def test_listed_key_is_vouched_for_without_measurements(binding):
    evidence = KeyOnlyAttester().attest(binding)
    attested = KeyOnlyVerifier(frozenset({b"a" * 32, b"s" * 32})).verify(evidence, binding)
    assert attested.kind is EvidenceKind.KEY_ONLY
    assert attested.measurements == {}


@pytest.mark.parametrize("allowed", [frozenset(), frozenset({b"a" * 32})])
def test_unlisted_key_is_refused(binding, allowed):
    with pytest.raises(AttestationError) as caught:
        KeyOnlyVerifier(allowed).verify(b"", binding)
    assert caught.value.check == "key"


def test_key_only_evidence_with_bytes_is_refused(binding):
    with pytest.raises(AttestationError) as caught:
        KeyOnlyVerifier(frozenset({b"s" * 32})).verify(b"x", binding)
    assert caught.value.check == "evidence"


def test_allowed_key_of_wrong_length_is_misuse():
    with pytest.raises(MisuseError):
        KeyOnlyVerifier(frozenset({b"short"}))
