import multiprocessing
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from transport.attestation.dev_authority import (
    AUTHORITY_FILE,
    DevAttester,
    DevAuthority,
    default_directory,
    dev_verifier,
)
from transport.attestation.document_verifier import NitroVerifier, aws_root, read_document
from transport.attestation.evidence_binding import EvidenceKind
from transport.errors import AttestationError, MisuseError

PCRS = {0: b"\x01" * 48, 2: b"\x02" * 48}


@pytest.fixture(scope="module")
def authority():
    return DevAuthority.create(datetime.now(UTC))


def test_development_evidence_passes_the_verifier_of_enclaves(authority, binding):
    evidence = DevAttester(authority, PCRS).attest(binding)
    attested = dev_verifier(authority.root_cert, PCRS).verify(evidence, binding)
    assert attested.kind is EvidenceKind.DEV
    assert attested.measurements == PCRS


def test_unpinned_development_verifier_takes_any_measurement(authority, binding):
    evidence = DevAttester(authority, {}).attest(binding)
    attested = dev_verifier(authority.root_cert, None).verify(evidence, binding)
    assert attested.measurements == {0: bytes(48)}


def test_development_measurements_are_compared_where_pinned(authority, binding):
    evidence = DevAttester(authority, PCRS).attest(binding)
    with pytest.raises(AttestationError, match="pcrs"):
        dev_verifier(authority.root_cert, {0: b"\x09" * 48}).verify(evidence, binding)


def test_development_evidence_never_passes_for_an_enclaves(authority, binding):
    evidence = DevAttester(authority, PCRS).attest(binding)
    verifier = NitroVerifier(aws_root(), PCRS, clock=lambda: datetime.now(UTC), allow_debug=True)
    with pytest.raises(AttestationError) as caught:
        verifier.verify(evidence, binding)
    assert caught.value.check == "root"


def test_evidence_of_another_authority_is_refused(authority, binding):
    evidence = DevAttester(DevAuthority.create(datetime.now(UTC)), PCRS).attest(binding)
    with pytest.raises(AttestationError, match="root"):
        dev_verifier(authority.root_cert, PCRS).verify(evidence, binding)


def test_leaf_is_renewed_before_it_expires(authority, binding):
    now = datetime.now(UTC)
    times = iter([now, now, now + timedelta(hours=1), now + timedelta(hours=100)])
    attester = DevAttester(authority, PCRS, clock=lambda: next(times))
    leaves = [read_document(attester.attest(binding)).certificate for _ in range(3)]
    assert leaves[0] == leaves[1] != leaves[2]
    renewed = x509.load_der_x509_certificate(leaves[2])
    assert renewed.not_valid_after_utc > now + timedelta(hours=100)


@pytest.mark.parametrize("step", [timedelta(minutes=6), timedelta(days=1), timedelta(days=2000)])
def test_evidence_holds_after_the_clock_is_set_back(binding, step):
    clock = datetime.now(UTC)
    authority = DevAuthority.create(clock)
    attester = DevAttester(authority, PCRS, clock=lambda: clock)
    verifier = dev_verifier(authority.root_cert, PCRS, clock=lambda: clock)
    verifier.verify(attester.attest(binding), binding)
    clock -= step
    verifier.verify(attester.attest(binding), binding)
    clock += step
    verifier.verify(attester.attest(binding), binding)


@pytest.mark.parametrize("years", [-11, 11])
def test_an_authority_that_is_not_valid_by_the_clock_is_named_with_both_times(tmp_path, years):
    DevAuthority.load_or_create(tmp_path)
    other = datetime.now(UTC) + timedelta(days=366 * years)
    with pytest.raises(
        MisuseError, match=rf"valid from .* clock says {other:%Y}-.*delete the file"
    ):
        DevAuthority.load_or_create(tmp_path, clock=lambda: other)


@pytest.mark.parametrize("measurements", [{40: bytes(48)}, {0: b"short"}])
def test_measurement_no_register_can_hold_is_misuse(authority, measurements):
    with pytest.raises(MisuseError):
        DevAttester(authority, measurements)


def test_authority_is_made_once_and_kept_to_its_owner(tmp_path, binding):
    directory = tmp_path / "state" / "dev"
    first = DevAuthority.load_or_create(directory)
    second = DevAuthority.load_or_create(directory)
    assert first.root_cert == second.root_cert
    assert [path.name for path in directory.iterdir()] == [AUTHORITY_FILE]
    assert stat.S_IMODE((directory / AUTHORITY_FILE).stat().st_mode) == 0o600
    evidence = DevAttester(first, PCRS).attest(binding)
    dev_verifier(second.root_cert, PCRS).verify(evidence, binding)


def _root_serial(directory):
    return DevAuthority.load_or_create(directory).root_cert.serial_number


def test_processes_that_race_agree_on_one_authority(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        serials = pool.map(_root_serial, [tmp_path / "dev"] * 8, chunksize=1)
    assert len(set(serials)) == 1
    assert [path.name for path in (tmp_path / "dev").iterdir()] == [AUTHORITY_FILE]


def test_authority_open_to_others_is_refused(tmp_path):
    DevAuthority.load_or_create(tmp_path)
    (tmp_path / AUTHORITY_FILE).chmod(0o640)
    with pytest.raises(MisuseError, match="chmod 600"):
        DevAuthority.load_or_create(tmp_path)


def test_authority_of_another_user_is_refused(tmp_path, monkeypatch):
    DevAuthority.load_or_create(tmp_path)
    if os.geteuid() == 0:
        os.chown(tmp_path / AUTHORITY_FILE, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(MisuseError, match=r"development authority .* belongs to another user"):
        DevAuthority.load_or_create(tmp_path)


def test_authority_that_others_could_swap_is_neither_used_nor_made(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(MisuseError, match="chmod go-w"):
        DevAuthority.load_or_create(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_authority_behind_a_link_is_refused(tmp_path):
    DevAuthority.load_or_create(tmp_path / "theirs")
    (tmp_path / "ours").mkdir(mode=0o700)
    (tmp_path / "ours" / AUTHORITY_FILE).symlink_to(tmp_path / "theirs" / AUTHORITY_FILE)
    with pytest.raises(MisuseError, match="symbolic link"):
        DevAuthority.load_or_create(tmp_path / "ours")


def test_damaged_authority_is_refused(tmp_path):
    DevAuthority.load_or_create(tmp_path)
    path = tmp_path / AUTHORITY_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MisuseError, match="delete it"):
        DevAuthority.load_or_create(tmp_path)


def test_authority_with_a_foreign_key_is_refused(tmp_path):
    for name in "ab":
        DevAuthority.load_or_create(tmp_path / name)
    one, other = (tmp_path / name / AUTHORITY_FILE for name in "ab")
    key, _, _ = one.read_bytes().partition(b"-----BEGIN CERT")
    _, _, certificate = other.read_bytes().partition(b"-----BEGIN CERT")
    one.write_bytes(key + b"-----BEGIN CERT" + certificate)
    with pytest.raises(MisuseError, match="another key"):
        DevAuthority.load_or_create(tmp_path / "a")


def test_unusable_directory_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MisuseError, match="VEILPIPE_DEV_DIR"):
        DevAuthority.load_or_create(blocked / "dev")


@pytest.mark.parametrize(
    ("environment", "directory"),
    [
        ({"VEILPIPE_DEV_DIR": "/a", "XDG_STATE_HOME": "/b"}, Path("/a")),
        ({"XDG_STATE_HOME": "/b"}, Path("/b/veilpipe/dev")),
        ({}, Path.home() / ".local/state/veilpipe/dev"),
    ],
)
def test_directory_follows_the_environment(environment, directory):
    assert default_directory(environment) == directory


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def no_account(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_account)
    with pytest.raises(MisuseError, match="set VEILPIPE_DEV_DIR"):
        default_directory({})
    assert default_directory({"VEILPIPE_DEV_DIR": "/a"}) == Path("/a")
    assert default_directory({"XDG_STATE_HOME": "/b"}) == Path("/b/veilpipe/dev")
