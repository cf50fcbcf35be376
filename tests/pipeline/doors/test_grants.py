"""What is sealed to a door opens there, for that manifest and session, and nowhere else."""

import json
from pathlib import Path

import cryptography_vectors
import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pyhpke import AEADId, CipherSuite, KDFId, KEMId, KEMKey

from pipeline.doors.door_keys import (
    GRACE_SECONDS,
    LIFETIME_SECONDS,
    DoorKeys,
    WrongKey,
    load_older_key,
)
from pipeline.doors.grants import KEY_ID_BYTES, SUITE, Grant, derive, grant_info, key_id
from pipeline.doors.messages import DoorError, DoorFault
from pipeline.errors import InputError
from tests.pipeline.doors.rig import clock

__all__ = ["clock"]

CORE = b"\7" * 32
INFO = grant_info(CORE, "chat")
GRANT = Grant(bytes(range(32)), bytes(range(32, 64)))
# X25519, HKDF-SHA256, AES-256-GCM
OTHERS = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.AES256_GCM)


@pytest.fixture(scope="module")
def older_key():
    return rsa.generate_private_key(65537, 2048)


def refused(keys, sealed, info=INFO, fault=DoorFault.UNAUTHENTIC):
    with pytest.raises(DoorError) as caught:
        keys.open(sealed, info)
    assert caught.value.fault is fault


def test_a_grant_goes_round(clock):
    keys = DoorKeys(clock)
    assert keys.open(GRANT.seal(keys.public_key(), INFO), INFO) == GRANT
    assert keys.open(memoryview(GRANT.seal(keys.public_key(), INFO)), INFO) == GRANT


@pytest.mark.parametrize(
    "info", [b"", grant_info(CORE, "cha"), grant_info(bytes(32), "chat"), INFO + b"x"], ids=repr
)
def test_a_grant_for_another_session_or_manifest_is_refused(clock, info):
    keys = DoorKeys(clock)
    refused(keys, GRANT.seal(keys.public_key(), info))


def test_every_byte_of_a_grant_counts(clock):
    keys = DoorKeys(clock)
    sealed = GRANT.seal(keys.public_key(), INFO)
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1
        if at < KEY_ID_BYTES:
            with pytest.raises(WrongKey):
                keys.open(changed, INFO)
        else:
            refused(keys, changed)
    for cut in (b"", sealed[:-1], sealed + b"x", sealed[:40]):
        refused(keys, cut, fault=DoorFault.INVALID)


def test_another_library_seals_what_a_door_opens_and_opens_what_a_client_seals(clock):
    keys = DoorKeys(clock)
    public = keys.public_key()
    far = KEMKey.from_pyca_cryptography_key(X25519PublicKey.from_public_bytes(public))
    encapsulated, sender = OTHERS.create_sender_context(far, INFO)
    theirs = key_id(public) + encapsulated + sender.seal(GRANT.session_key + GRANT.owner)
    assert keys.open(theirs, INFO) == GRANT

    private = X25519PrivateKey.generate()
    ours = GRANT.seal(private.public_key().public_bytes_raw(), INFO)[KEY_ID_BYTES:]
    own = KEMKey.from_pyca_cryptography_key(private)
    opened = OTHERS.create_recipient_context(ours[:32], own, INFO).open(ours[32:])
    assert opened == GRANT.session_key + GRANT.owner


def test_the_suite_is_the_one_of_the_rfc():
    """Its vectors have aad, which the library takes only below its own interface."""
    path = Path(cryptography_vectors.__file__).parent / "HPKE" / "test-vectors.json"
    ids = {"mode": 0, "kem_id": 0x20, "kdf_id": 1, "aead_id": 2}
    (vector,) = [
        each
        for each in json.loads(path.read_text())
        if all(each[name] == value for name, value in ids.items())
    ]
    key = X25519PrivateKey.from_private_bytes(bytes.fromhex(vector["skRm"]))
    info = bytes.fromhex(vector["info"])
    first = {name: bytes.fromhex(value) for name, value in vector["encryptions"][0].items()}
    sealed = bytes.fromhex(vector["enc"]) + first["ct"]
    decrypt = openssl.hpke._decrypt_with_aad
    assert decrypt(SUITE, sealed, key, info, first["aad"]) == first["pt"]


def test_keys_are_renewed_hourly_and_the_one_before_is_good_for_minutes(clock):
    keys = DoorKeys(clock)
    begin, public = clock.now, keys.public_key()
    sealed = GRANT.seal(public, INFO)
    clock.now = begin + LIFETIME_SECONDS - 1
    assert keys.public_key() == public
    clock.now = begin + LIFETIME_SECONDS
    newer = keys.public_key()
    assert newer != public
    assert keys.open(sealed, INFO) == GRANT
    clock.now = begin + LIFETIME_SECONDS + GRACE_SECONDS
    with pytest.raises(WrongKey):
        keys.open(sealed, INFO)
    assert keys.public_key() == newer


@pytest.mark.parametrize("seconds", [-1.0, -1e9, 2 * LIFETIME_SECONDS, 1e12])
def test_a_clock_that_jumps_ends_a_key_for_good(clock, seconds):
    keys = DoorKeys(clock)
    begin, public = clock.now, keys.public_key()
    sealed = GRANT.seal(public, INFO)
    clock.now = begin + seconds
    assert keys.public_key() != public
    with pytest.raises(WrongKey):
        keys.open(sealed, INFO)
    clock.now = begin
    with pytest.raises(WrongKey):
        keys.open(sealed, INFO)


def older(plain, key, hash_=SHA256):
    oaep = padding.OAEP(padding.MGF1(hash_()), hash_(), None)
    return key.public_key().encrypt(plain, oaep)


def test_older_clients_seal_a_key_by_rsa_where_the_door_says_so(clock, older_key):
    keys = DoorKeys(clock, older_key)
    alone = keys.open(older(GRANT.session_key, older_key), INFO)
    assert alone == Grant(GRANT.session_key, derive(GRANT.session_key, b"owner"))
    assert keys.open(older(GRANT.session_key + GRANT.owner, older_key), INFO) == GRANT
    for plain in (b"", GRANT.session_key[:-1], bytes(63)):
        refused(keys, older(plain, older_key))
    refused(keys, bytes(256))
    refused(DoorKeys(clock), older(GRANT.session_key, older_key), fault=DoorFault.INVALID)


def pem(key):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def test_an_older_key_is_its_owners_alone_and_long_enough(tmp_path, older_key):
    path = tmp_path / "older.pem"
    with pytest.raises(InputError, match="cannot read key file"):
        load_older_key(path)
    for data, mode, match in (
        (pem(older_key), 0o644, "open to other users"),
        (b"no key", 0o600, "is not an RSA key"),
        (pem(rsa.generate_private_key(65537, 1024)), 0o600, "at least 2048 bits"),
        (pem(X25519PrivateKey.generate()), 0o600, "at least 2048 bits"),
    ):
        path.write_bytes(data)
        path.chmod(mode)
        with pytest.raises(InputError, match=match):
            load_older_key(path)
    path.write_bytes(pem(older_key))
    assert load_older_key(path).private_numbers() == older_key.private_numbers()


def test_secrets_are_not_shown():
    assert "\\x01" not in repr(GRANT)
    assert "0102" not in repr(GRANT)
    assert "session_key" not in repr(GRANT)
