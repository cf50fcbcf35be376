from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from transport.attestation import certificate_chain as chain_module
from transport.attestation.certificate_chain import ChainVerifier
from transport.errors import AttestationError, MisuseError


def verify(root, nodes):
    *bundle, leaf = nodes
    return ChainVerifier(root.certificate).verify(leaf.der, [node.der for node in bundle])


def refused(root, nodes, check="chain"):
    with pytest.raises(AttestationError) as caught:
        verify(root, nodes)
    assert caught.value.check == check
    return caught.value.detail


def test_chain_gives_the_leafs_key_and_the_narrowest_validity(synthetic):
    root = synthetic.issue("root", not_after=synthetic.now + timedelta(days=9))
    lower = synthetic.issue("lower", root, not_before=synthetic.now - timedelta(hours=2))
    leaf = synthetic.issue("leaf", lower, ca=False, not_after=synthetic.now + timedelta(hours=3))
    verified = verify(root, (root, lower, leaf))
    assert verified.public_key == leaf.key.public_key()
    assert verified.validity.not_before == synthetic.now - timedelta(hours=2)
    assert verified.validity.not_after == synthetic.now + timedelta(hours=3)


def test_leaf_directly_under_the_root_is_accepted(synthetic):
    root = synthetic.issue("root", path_length=0)
    verify(root, (root, synthetic.issue("leaf", root, ca=False)))


def test_leaf_without_basic_constraints_is_accepted(synthetic, chain):
    leaf = synthetic.issue("leaf", chain[2], ca=False, constraints=False)
    verify(chain[0], (*chain[:3], leaf))


def test_wrong_root_is_refused(synthetic, chain):
    refused(synthetic.issue("root"), chain, "root")


def test_bundle_that_begins_with_another_root_is_refused(synthetic, chain):
    other = synthetic.chain()
    refused(chain[0], other, "root")
    refused(chain[0], (chain[0], *other[1:]))


def test_empty_bundle_is_refused(chain):
    refused(chain[0], chain[3:], "root")


def test_swapped_leaf_is_refused(synthetic, chain):
    foreign = synthetic.chain()[3]  # same names, another authority's signature
    assert "is not signed by" in refused(chain[0], (*chain[:3], foreign))


def test_leaf_that_names_another_issuer_is_refused(synthetic, chain):
    leaf = synthetic.issue("leaf", chain[2], ca=False, issuer_name=chain[1].certificate.subject)
    refused(chain[0], (*chain[:3], leaf))


def test_missing_swapped_and_doubled_intermediates_are_refused(chain):
    root, upper, lower, leaf = chain
    refused(root, (root, lower, leaf))
    refused(root, (root, upper, leaf))
    refused(root, (root, lower, upper, leaf))
    refused(root, (root, upper, upper, lower, leaf))
    refused(root, (root, root, upper, lower, leaf))


def test_path_length_is_enforced_at_every_level(synthetic):
    root = synthetic.issue("root", path_length=1)
    upper = synthetic.issue("upper", root)
    lower = synthetic.issue("lower", upper)
    assert "path length" in refused(
        root, (root, upper, lower, synthetic.issue("leaf", lower, ca=False))
    )
    root = synthetic.issue("root")
    upper = synthetic.issue("upper", root, path_length=0)
    lower = synthetic.issue("lower", upper)
    assert "path length" in refused(
        root, (root, upper, lower, synthetic.issue("leaf", lower, ca=False))
    )


@pytest.mark.parametrize(
    ("flaws", "reason"),
    [
        ({"ca": False, "cert_sign": True}, "not a certificate authority"),
        ({"constraints": False}, "not a certificate authority"),
        ({"cert_sign": False, "digital_signature": True}, "may not sign certificates"),
        ({"usage": False}, "may not sign certificates"),
        ({"algorithm": hashes.SHA256()}, "signed with"),
        ({"algorithm": hashes.SHA512()}, "signed with"),
        ({"curve": ec.SECP256R1()}, "no P-384"),
        ({"curve": ec.SECP521R1()}, "no P-384"),
        ({"extra": x509.InhibitAnyPolicy(0)}, "unknown critical"),
    ],
)
def test_flawed_issuer_is_refused(synthetic, chain, flaws, reason):
    root, upper, *_ = chain
    lower = synthetic.issue("lower", upper, **flaws)
    leaf = synthetic.issue("leaf", lower, ca=False)
    assert reason in refused(root, (root, upper, lower, leaf))


@pytest.mark.parametrize(
    ("flaws", "reason"),
    [
        ({"ca": True, "digital_signature": True}, "is a certificate authority"),
        ({"ca": False, "cert_sign": True}, "may not sign documents"),
        ({"ca": False, "digital_signature": False}, "may not sign documents"),
        ({"ca": False, "usage": False}, "may not sign documents"),
        ({"ca": False, "algorithm": hashes.SHA256()}, "signed with"),
        ({"ca": False, "curve": ec.SECP256R1()}, "no P-384"),
        ({"ca": False, "extra": x509.InhibitAnyPolicy(0)}, "unknown critical"),
    ],
)
def test_flawed_leaf_is_refused(synthetic, chain, flaws, reason):
    leaf = synthetic.issue("leaf", chain[2], **flaws)
    assert reason in refused(chain[0], (*chain[:3], leaf))


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("is_past", [True, False])
def test_one_certificate_out_of_its_time_spoils_the_chain(synthetic, level, is_past):
    hours = timedelta(hours=1)
    lifetime = (
        {"not_after": synthetic.now - hours} if is_past else {"not_before": synthetic.now + hours}
    )
    nodes = []
    for position, name in enumerate(("root", "upper", "lower", "leaf")):
        odd = lifetime if position == level else {}
        issuer = nodes[-1] if nodes else None
        nodes.append(synthetic.issue(name, issuer, ca=name != "leaf", **odd))
    validity = verify(nodes[0], nodes).validity
    with pytest.raises(AttestationError) as caught:
        validity.require_contains(synthetic.now)
    assert caught.value.check == "validity"


def test_clock_without_zone_is_misuse(synthetic, chain):
    with pytest.raises(MisuseError):
        verify(chain[0], chain).validity.require_contains(synthetic.now.replace(tzinfo=None))


def test_too_many_certificates_are_refused_before_any_is_verified(chain):
    root = chain[0]
    assert "allowed: 8" in refused(root, (*[root] * 9, chain[3]))


@pytest.mark.parametrize("junk", [b"", b"\x30", b"junk", b"\x30\x03\x02\x01\x01"])
def test_bytes_that_are_no_certificate_are_refused(chain, junk):
    verifier = ChainVerifier(chain[0].certificate)
    with pytest.raises(AttestationError):
        verifier.verify(junk, [node.der for node in chain[:3]])
    with pytest.raises(AttestationError):
        verifier.verify(chain[3].der, [chain[0].der, junk, chain[2].der])
    with pytest.raises(AttestationError):
        verifier.verify(chain[3].der + b"\x00", [node.der for node in chain[:3]])


@pytest.mark.parametrize("flaws", [{"ca": False}, {"curve": ec.SECP256R1()}, {"usage": False}])
def test_unusable_root_is_misuse(synthetic, flaws):
    with pytest.raises(MisuseError):
        ChainVerifier(synthetic.issue("root", **flaws).certificate)


def test_root_not_signed_by_itself_is_misuse(synthetic, chain):
    with pytest.raises(MisuseError):
        ChainVerifier(chain[1].certificate)


def test_verified_bundle_is_remembered_and_a_refused_one_is_not(chain, synthetic, monkeypatch):
    parsed = []
    original = chain_module._parse
    monkeypatch.setattr(chain_module, "_parse", lambda der: (parsed.append(der), original(der))[1])
    verifier = ChainVerifier(chain[0].certificate)
    bundle = [node.der for node in chain[:3]]
    verifier.verify(chain[3].der, bundle)
    assert parsed == [*bundle[1:], chain[3].der]
    parsed.clear()
    verifier.verify(chain[3].der, bundle)
    assert parsed == [chain[3].der]
    for _ in range(2):
        parsed.clear()
        with pytest.raises(AttestationError):
            verifier.verify(chain[3].der, [bundle[0], bundle[2]])
        assert parsed[0] == bundle[2]


def test_number_of_remembered_bundles_is_bounded(synthetic, monkeypatch):
    monkeypatch.setattr(chain_module, "CACHE_CAPACITY", 2)
    root = synthetic.issue("root")
    verifier = ChainVerifier(root.certificate)
    for name in "abc":
        middle = synthetic.issue(name, root)
        leaf = synthetic.issue("leaf", middle, ca=False)
        verifier.verify(leaf.der, [root.der, middle.der])
    assert len(verifier._issuers) == 2


def test_every_altered_byte_of_a_certificate_is_refused(chain):
    root, upper, lower, leaf = chain
    verifier = ChainVerifier(root.certificate)
    for position in range(len(upper.der)):
        altered = bytearray(upper.der)
        altered[position] ^= 0x41
        with pytest.raises(AttestationError):
            verifier.verify(leaf.der, [root.der, bytes(altered), lower.der])
    for position in range(len(leaf.der)):
        altered = bytearray(leaf.der)
        altered[position] ^= 0x41
        with pytest.raises(AttestationError):
            verifier.verify(bytes(altered), [root.der, upper.der, lower.der])
