"""Parties that the manifest names by their keys: a stage of one's own, and whom it asks."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import create_identity, load_identity
from pipeline.agreement.manifest import dump_manifest, parse_manifest
from pipeline.agreement.trust_policy import DevTrust, KeyedTrust, UserTrust
from pipeline.errors import ManifestError, PolicyError
from pipeline.planning.plan import PlanOptions, plan
from transport.attestation.evidence_binding import Binding
from transport.dial_and_listen import TcpEndpoint
from transport.errors import AttestationError
from transport.handshake import Role, RoleKind

WHERE = TcpEndpoint("127.0.0.1", 9500)
ORCHESTRATOR, STAGE, PART = Role(RoleKind.ORCHESTRATOR), Role(RoleKind.STAGE), Role(RoleKind.PART)


@pytest.fixture
def keyed(tiny_model, tmp_path):
    """A manifest whose three parties are named, and their key files."""
    keys = {name: create_identity(tmp_path / name) for name in ("orch", "stage", "part")}
    options = PlanOptions(
        1, orchestrator_keys=(keys["orch"],), stage_keys=(keys["stage"],),
        part=("attention", WHERE, keys["part"]),
    )  # fmt: skip
    return plan(tiny_model, options), tmp_path


def believes(trust, peer, key):
    """Whether a link's credentials take a peer's key."""
    (verifier,) = trust.toward(peer, {}).verifiers
    binding = Binding(peer.canonical(), bytes(32), key.public_key().public_bytes_raw(), bytes(32))
    try:
        verifier.verify(b"", binding)
    except AttestationError:
        return False
    return True


def test_everybody_believes_whom_the_manifest_names_and_nobody_else(keyed):
    manifest, directory = keyed
    trusts = {
        "orch": UserTrust.create(manifest, directory / "orch"),
        "stage": KeyedTrust.create(manifest, 0, load_identity(directory / "stage")),
        "part": KeyedTrust.for_part(manifest, load_identity(directory / "part")),
    }
    owners = {ORCHESTRATOR: "orch", STAGE: "stage", PART: "part"}
    for peer, owner in owners.items():
        for name, trust in trusts.items():
            assert believes(trusts["stage"], peer, trust.static_key) == (name == owner)
    assert not believes(trusts["orch"], STAGE, X25519PrivateKey.generate())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw["stages"][0].pop("machine_keys"), "--stage-key"),
        (lambda raw: raw["part"].pop("public_key"), "--part-key"),
        (lambda raw: raw["part"].update(public_key="11" * 32), "--part-key"),
    ],
)
def test_a_part_serves_only_where_it_and_its_stage_are_named(keyed, change, words):
    manifest, directory = keyed
    raw = json.loads(dump_manifest(manifest))
    change(raw)
    with pytest.raises(PolicyError, match=words):
        KeyedTrust.for_part(parse_manifest(json.dumps(raw)), load_identity(directory / "part"))


def test_a_stage_believes_no_part_that_is_not_named(keyed):
    manifest, directory = keyed
    raw = json.loads(dump_manifest(manifest))
    del raw["part"]["public_key"]
    trust = KeyedTrust.create(
        parse_manifest(json.dumps(raw)), 0, load_identity(directory / "stage")
    )
    assert not believes(trust, PART, load_identity(directory / "part"))


def test_development_evidence_does_not_go_past_a_parts_key(keyed):
    with pytest.raises(PolicyError, match="--dev"):
        DevTrust.for_manifest(*keyed)


def test_an_address_is_not_part_of_what_all_agree_on_and_a_key_is(keyed):
    manifest, _ = keyed
    raw = json.loads(dump_manifest(manifest))
    raw["part"]["address"]["addr"] = "10.0.0.1:1"
    assert parse_manifest(json.dumps(raw)).core_hash() == manifest.core_hash()
    raw["part"]["public_key"] = "00" * 32
    assert parse_manifest(json.dumps(raw)).core_hash() != manifest.core_hash()


def test_two_stages_ask_for_no_part(tiny_model):
    with pytest.raises(ManifestError, match="part is for manifests of one stage"):
        plan(tiny_model, PlanOptions(2, part=("attention", WHERE, None)))


def test_stages_between_two_at_home_keep_rows_encoded(tiny_model):
    manifest = plan(tiny_model, PlanOptions(4, home_layers=(1, 1)))
    assert list(manifest.encoded_stages) == [1, 2]
    assert [stage.layer_end for stage in manifest.stages] == [1, 2, 3, 4]
    raw = json.loads(dump_manifest(manifest))
    raw["home_stages"]["last"] = 3
    with pytest.raises(ManifestError, match="and leave others"):
        parse_manifest(json.dumps(raw))
