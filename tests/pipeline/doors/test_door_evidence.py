"""A key that no worker of the right core vouches for, for this nonce, is never sealed to."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.doors.door_evidence import (
    ROLE,
    TrustedKey,
    show_key,
    verify_key,
    wrong_key_nonce,
)
from pipeline.doors.messages import DoorError, DoorFault, InferRequest
from pipeline.errors import SessionError
from transport.attestation.dev_authority import DevAttester, DevAuthority, dev_verifier
from transport.attestation.document_verifier import NitroVerifier
from transport.attestation.evidence_binding import EvidenceKind
from transport.attestation.key_only import KeyOnlyAttester, KeyOnlyVerifier
from transport.errors import DeviceError
from transport.handshake import Role, RoleKind

CORE, KEY, NONCE = b"\1" * 32, b"\2" * 32, b"\3" * 32
PCRS = {0: b"\4" * 48}


@pytest.fixture(scope="module")
def authority():
    return DevAuthority.create(datetime.now(UTC))


class Nsm:
    kind = EvidenceKind.NITRO

    def __init__(self, authority, pcrs):
        self.attest = DevAttester(authority, pcrs).attest


def nitro(authority, pcrs=PCRS, later=timedelta()):
    return NitroVerifier(authority.root_cert, pcrs, clock=lambda: datetime.now(UTC) + later)


def test_evidence_of_the_right_core_makes_a_key_one_to_trust(authority):
    shown = show_key(KEY, CORE, NONCE, Nsm(authority, PCRS))
    assert verify_key(shown, CORE, NONCE, (nitro(authority),)) == TrustedKey(KEY)
    shown = show_key(KEY, CORE, NONCE, KeyOnlyAttester())
    assert verify_key(shown, CORE, NONCE, (KeyOnlyVerifier(frozenset({KEY})),)) == TrustedKey(KEY)


@pytest.mark.parametrize(
    ("change", "nonce", "match"),
    [
        ({}, b"\5" * 32, "refused: user_data"),
        ({"public_key": b"\5" * 32}, NONCE, "refused: user_data"),
        ({"public_key": b""}, NONCE, "a key of 0 bytes"),
        ({"core_hash": b"\5" * 32}, NONCE, "another manifest"),
        ({"evidence": b""}, NONCE, "refused: cose"),
        ({"evidence_kind": "dev"}, NONCE, "shows 'dev' evidence, not nitro"),
        ({"evidence_kind": "key_only", "evidence": b""}, NONCE, "shows 'key_only' evidence"),
    ],
    ids=str,
)
def test_anything_else_is_refused(authority, change, nonce, match):
    shown = replace(show_key(KEY, CORE, NONCE, Nsm(authority, PCRS)), **change)
    with pytest.raises(SessionError, match=match):
        verify_key(shown, CORE, nonce, (nitro(authority),))


def test_another_image_another_root_and_another_time_are_refused(authority):
    other = DevAuthority.create(datetime.now(UTC))
    for attester, verifier, match in (
        (Nsm(authority, {0: b"\6" * 48}), nitro(authority), "pcrs"),
        (Nsm(authority, {}), nitro(authority), "debug"),
        (Nsm(other, PCRS), nitro(authority), "root"),
        (Nsm(authority, PCRS), nitro(authority, later=timedelta(hours=1)), "timestamp"),
        (Nsm(authority, PCRS), nitro(authority, later=-timedelta(hours=1)), "validity|timestamp"),
    ):
        shown = show_key(KEY, CORE, NONCE, attester)
        with pytest.raises(SessionError, match=match):
            verify_key(shown, CORE, NONCE, (verifier,))


def test_a_stages_evidence_is_none_of_a_door():
    assert ROLE not in {Role(RoleKind.STAGE, idx).canonical() for idx in range(3)}


def test_evidence_is_as_fresh_as_the_clients_nonce(authority):
    for nonce in (b"", b"\1" * 31, b"\1" * 33):
        with pytest.raises(DoorError) as caught:
            show_key(KEY, CORE, nonce, Nsm(authority, PCRS))
        assert caught.value.fault is DoorFault.INVALID


def test_each_grant_has_a_nonce_of_its_own():
    one, two = (InferRequest(b"", grant, b"", (), "", "") for grant in (b"a", memoryview(b"b")))
    assert len({wrong_key_nonce(one), wrong_key_nonce(two)}) == 2
    assert len(wrong_key_nonce(one)) == 32


def test_a_module_that_fails_is_the_doors_fault():
    class Broken:
        kind = EvidenceKind.NITRO

        def attest(self, binding):
            raise DeviceError("/dev/nsm: no such device")

    with pytest.raises(DoorError) as caught:
        show_key(KEY, CORE, NONCE, Broken())
    assert caught.value.fault is DoorFault.UNAVAILABLE
    assert "nsm" not in str(caught.value)


def test_dev_evidence_is_judged_by_its_own_authority(authority):
    shown = show_key(KEY, CORE, NONCE, DevAttester(authority, {}))
    assert verify_key(shown, CORE, NONCE, (dev_verifier(authority.root_cert, None),))
    with pytest.raises(SessionError, match="not nitro"):
        verify_key(shown, CORE, NONCE, (nitro(authority),))
