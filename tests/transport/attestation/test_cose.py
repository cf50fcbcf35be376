import contextlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from transport.attestation import cbor, cose
from transport.errors import AttestationError, MisuseError, ProtocolError

KEY = ec.generate_private_key(ec.SECP384R1())
SIGNED = cose.sign(b"payload", KEY)
PROTECTED = cbor.encode({1: -35})


def sign1(protected=PROTECTED, unprotected=None, payload=b"payload", signature=b"\x01" * 96):
    return cbor.encode([protected, unprotected or {}, payload, signature])


@pytest.mark.parametrize("document", [SIGNED, b"\xd2" + SIGNED])
def test_signed_document_verifies_with_and_without_its_tag(document):
    parsed = cose.parse(document)
    parsed.verify(KEY.public_key())
    assert parsed.payload == b"payload"


def test_another_key_does_not_verify():
    with pytest.raises(AttestationError) as caught:
        cose.parse(SIGNED).verify(ec.generate_private_key(ec.SECP384R1()).public_key())
    assert caught.value.check == "signature"


@pytest.mark.parametrize("position", range(len(SIGNED)))
def test_every_flipped_byte_is_refused(position):
    altered = bytearray(SIGNED)
    altered[position] ^= 1
    with pytest.raises(AttestationError):
        cose.parse(bytes(altered)).verify(KEY.public_key())


@pytest.mark.parametrize(
    "document",
    [
        sign1(protected=cbor.encode({1: -1})),  # an emulated module's unsigned document
        sign1(protected=cbor.encode({1: -7})),
        sign1(protected=cbor.encode({1: -36})),
        sign1(protected=cbor.encode({})),
        sign1(protected=b""),
        sign1(protected=cbor.encode({1: -35, 4: b"kid"})),
        sign1(protected=cbor.encode([1, -35])),
        sign1(protected=PROTECTED + b"\x00"),
        sign1(unprotected={1: -35}),
        sign1(payload=b""),
        sign1(signature=b""),
        sign1(signature=b"\x01" * 95),
        sign1(signature=b"\x01" * 97),
        cbor.encode([PROTECTED, {}, None, b"\x01" * 96]),
        cbor.encode([PROTECTED, {}, b"payload"]),
        cbor.encode([PROTECTED, {}, b"payload", b"\x01" * 96, b""]),
        cbor.encode({1: PROTECTED}),
        b"\xd2\xd2" + SIGNED,
        b"\xd1" + SIGNED,
        SIGNED + b"\x00",
        b"",
    ],
)
def test_every_other_shape_is_refused(document):
    with pytest.raises(AttestationError):
        cose.parse(document)


@pytest.mark.parametrize("signature", [bytes(96), b"\xff" * 96, bytes(48) + b"\x01" * 48])
def test_degenerate_signatures_are_refused(signature):
    with pytest.raises(AttestationError):
        cose.parse(sign1(signature=signature)).verify(KEY.public_key())


@given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda b: SIGNED[:40] + b))
def test_arbitrary_bytes_raise_nothing_but_protocol_errors(data):
    with contextlib.suppress(ProtocolError):
        cose.parse(data).verify(KEY.public_key())


def test_a_key_of_another_curve_cannot_sign():
    with pytest.raises(MisuseError):
        cose.sign(b"payload", ec.generate_private_key(ec.SECP256R1()))
