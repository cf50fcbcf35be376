from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from enclave import eif, signing
from enclave.errors import EifError

Signer = Callable[[ec.EllipticCurve], tuple[bytes, bytes]]
_CURVES = [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()]


@pytest.mark.parametrize("curve", _CURVES, ids=lambda curve: curve.name)
def test_signed_image_verifies_and_has_register_8(
    image: eif.Image, signer: Signer, curve: ec.EllipticCurve
) -> None:
    key, certificate_pem = signer(curve)
    signed = eif.unpack(b"".join(eif.pack(signing.sign(image, key, certificate_pem))))
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    assert signing.verify(signed) == certificate
    fingerprint = hashlib.sha384(certificate.public_bytes(Encoding.DER)).digest()
    assert eif.measure(signed)[8] == hashlib.sha384(bytes(48) + fingerprint).digest()
    assert {index: eif.measure(signed)[index] for index in range(3)} == eif.measure(image)


def test_signature_for_another_image_is_refused(image: eif.Image, signer: Signer) -> None:
    signed = signing.sign(image, *signer(_CURVES[1]))
    other = eif.Section(eif.SectionType.RAMDISK, b"other stage")
    moved = eif.Image((*image.sections[:3], other, signed.sections[-1]))
    with pytest.raises(EifError, match="another PCR0"):
        signing.verify(moved)


def test_every_changed_byte_of_a_signature_is_refused(image: eif.Image, signer: Signer) -> None:
    signed = signing.sign(image, *signer(_CURVES[1]))
    certificate, message = eif.read_signature(signed.sections[-1].data)
    for at in range(len(message)):
        damaged = message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]
        data = eif.write_signature(certificate, damaged)
        section = eif.Section(eif.SectionType.SIGNATURE, data)
        with pytest.raises(EifError):
            signing.verify(image.with_section(section))


def test_signature_by_another_key_is_refused(image: eif.Image, signer: Signer) -> None:
    signed = signing.sign(image, *signer(_CURVES[0]))
    _, message = eif.read_signature(signed.sections[-1].data)
    _, other_certificate = signer(_CURVES[1])
    section = eif.Section(
        eif.SectionType.SIGNATURE, eif.write_signature(other_certificate, message)
    )
    with pytest.raises(EifError, match="algorithm"):
        signing.verify(image.with_section(section))


def test_unsigned_image_is_refused(image: eif.Image) -> None:
    with pytest.raises(EifError, match="not signed"):
        signing.verify(image)


def test_image_is_not_signed_twice(image: eif.Image, signer: Signer) -> None:
    key, certificate = signer(_CURVES[1])
    with pytest.raises(EifError, match="already"):
        signing.sign(signing.sign(image, key, certificate), key, certificate)


def test_certificate_of_another_key_is_refused(image: eif.Image, signer: Signer) -> None:
    with pytest.raises(EifError, match="not for this signing key"):
        signing.sign(image, signer(_CURVES[0])[0], signer(_CURVES[1])[1])


@pytest.mark.parametrize(("key", "certificate"), [(b"junk", None), (None, b"junk")])
def test_junk_key_or_certificate_is_refused(
    image: eif.Image, signer: Signer, key: bytes | None, certificate: bytes | None
) -> None:
    good_key, good_certificate = signer(_CURVES[1])
    with pytest.raises(EifError, match="signing"):
        signing.sign(image, key or good_key, certificate or good_certificate)
