"""One's own machines: every link demands the very key that the manifest lists, or a measurement."""

import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import (
    MACHINE_KEY,
    create_identity,
    fingerprint,
    load_identity,
    own_identity,
    public_hex,
    state_directory,
)
from pipeline.agreement.manifest import build_manifest
from pipeline.agreement.trust_policy import (
    DevTrust,
    KeyedTrust,
    UserTrust,
    attested_verifier,
)
from pipeline.engine.limits import Limits
from pipeline.errors import InputError, ManifestError, PolicyError, SessionError
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.protocol.time_limits import TimeLimits
from transport.attestation.key_only import KeyOnlyAttester, KeyOnlyVerifier
from transport.handshake import Credentials

PROMPT_BYTES = 16


async def refused(deployment, *words):
    async with deployment.running() as (manifest, results):
        with pytest.raises(SessionError) as caught:
            await deployment.generate(manifest, results)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    tokens = b"".join(t.to_bytes(4, "little") for t in deployment.PROMPT)
    assert tokens[:PROMPT_BYTES] not in deployment.tap.seen


@pytest.mark.parametrize("keyed", [(0, 1), (0,), (1,)], ids=str)
async def test_machines_known_by_key_compute_alone_and_beside_attested_stages(deployment, keyed):
    deployment.know_by_key(*keyed)
    async with deployment.running() as (manifest, results):
        tokens = await deployment.generate(manifest, results)
    assert tokens == deployment.reference(12)
    prompt = b"".join(t.to_bytes(4, "little") for t in deployment.PROMPT)
    assert prompt[:PROMPT_BYTES] not in deployment.tap.seen


async def test_a_machine_whose_key_has_changed_is_refused_as_ssh_says_it(deployment):
    deployment.know_by_key(0, 1)
    deployment.keys[1] = X25519PrivateKey.generate()
    shown = fingerprint(deployment.keys[1].public_key().public_bytes_raw())
    await refused(deployment, "STAGE 1", "HAS CHANGED", shown, "pipeline-orch join")


async def test_a_stage_refuses_a_neighbour_of_another_key_whatever_the_user_believes(deployment):
    deployment.know_by_key(0, 1)
    deployment.keys[1] = X25519PrivateKey.generate()
    new = deployment.keys[1].public_key().public_bytes_raw()
    async with deployment.running() as (manifest, results):
        trust = UserTrust.create(manifest, deployment.identity, deployment.authority.root_cert)

        class Deceived:
            def toward(self, peer, measurements):
                right = trust.toward(peer, measurements)
                if peer.stage_idx == 0:
                    return right
                anybody = KeyOnlyVerifier(frozenset({new}))
                return Credentials(right.static_key, right.attester, (anybody,))

        options = PipelineOptions(
            Limits(1, 256), times=TimeLimits(connect_seconds=10), data_out_listen=results
        )
        with pytest.raises(SessionError, match="HAS CHANGED"):
            async with open_pipeline(manifest, Deceived(), options, lambda line: None):
                raise AssertionError("the pipeline must not come up")


async def test_a_stage_that_must_be_attested_is_not_believed_for_a_key(deployment):
    deployment.know_by_key(0)
    deployment.attesters[1] = KeyOnlyAttester()
    await refused(deployment, "stage 1", "KEY_ONLY", "accepted here: NITRO")


async def test_a_machine_known_by_key_is_not_believed_for_a_measurement(deployment):
    deployment.know_by_key(0, 1)
    deployment.attesters[1] = deployment.module(1)
    await refused(deployment, "stage 1", "NITRO", "accepted here: KEY_ONLY")


async def test_an_orchestrator_that_is_not_listed_is_refused_here_and_there(deployment, tmp_path):
    deployment.know_by_key(0, 1)
    stranger = tmp_path / "other.pem"
    create_identity(stranger)
    with pytest.raises(PolicyError, match="lists other orchestrators"):
        UserTrust.create(deployment.pinned, stranger)
    async with deployment.running() as (manifest, results):
        other = UserTrust(load_identity(stranger), manifest, deployment.authority.root_cert)
        options = PipelineOptions(
            Limits(1, 256), times=TimeLimits(connect_seconds=10), data_out_listen=results
        )
        with pytest.raises(SessionError, match="stage"):
            async with open_pipeline(manifest, other, options, lambda line: None):
                raise AssertionError("the pipeline must not come up")


def test_keys_are_of_the_core_and_change_nothing_where_there_are_none(deployment):
    before = deployment.planned.core_hash()
    assert "machine_keys" not in deployment.planned.core()["stages"][0]
    deployment.know_by_key(0)
    keyed = deployment.planned.core_hash()
    assert keyed != before
    deployment.know_by_key(1)
    assert deployment.planned.core_hash() not in {before, keyed}


def test_a_stage_known_by_two_things_is_refused(deployment):
    fields = deployment.pinned.model_dump(mode="json")
    fields["stages"][0]["machine_keys"] = ["ab" * 32]
    with pytest.raises(ManifestError, match="not by both"):
        build_manifest(fields, "manifest")


@pytest.mark.parametrize("ignores", [False, True], ids=str)
def test_neither_development_nor_a_door_goes_past_the_keys(deployment, tmp_path, ignores):
    assert DevTrust.for_manifest(deployment.planned, tmp_path)
    deployment.know_by_key(0)
    with pytest.raises(PolicyError, match="--dev"):
        DevTrust.for_manifest(deployment.planned, tmp_path, ignores_measurements=ignores)
    with pytest.raises(PolicyError, match="attests nothing"):
        attested_verifier(deployment.pinned, 0, deployment.authority.root_cert)


def test_a_machine_serves_what_it_is_named_for_and_nothing_unpinned(deployment):
    deployment.know_by_key(0)
    manifest = deployment.planned
    assert KeyedTrust.create(manifest, 0, deployment.keys[0])
    with pytest.raises(PolicyError, match="other machines than this one"):
        KeyedTrust.create(manifest, 0, deployment.keys[1])
    with pytest.raises(PolicyError, match="other machines than this one"):
        KeyedTrust.create(manifest, 1, deployment.keys[1])
    for lacking in ({"orchestrator_keys": ()}, {"config_hash": None}):
        with pytest.raises(PolicyError, match=next(iter(lacking))):
            KeyedTrust.create(manifest.model_copy(update=lacking), 0, deployment.keys[0])
    stage = manifest.stage(0).model_copy(update={"weight_hashes": ()})
    bare = manifest.model_copy(update={"stages": (stage, manifest.stage(1))})
    with pytest.raises(PolicyError, match="weight_hashes"):
        KeyedTrust.create(bare, 0, deployment.keys[0])


def test_an_identity_is_made_once_and_is_its_owners_alone(tmp_path):
    directory = state_directory({"VEILPIPE_STATE_DIR": str(tmp_path / "a" / "b")})
    first = own_identity(directory, MACHINE_KEY)
    path = directory / MACHINE_KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert public_hex(own_identity(directory, MACHINE_KEY)) == public_hex(first)
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        own_identity(directory, MACHINE_KEY)
    assert state_directory({"XDG_STATE_HOME": "/s"}).parts[-2:] == ("s", "veilpipe")
