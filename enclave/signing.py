"""Signing an image, so that PCR8 names who built it: COSE_Sign1 over PCR0 and the certificate.

Source: RFC 9052, and the signature section as nitro-cli writes it.
"""

from __future__ import annotations

from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from enclave import cbor, eif
from enclave.errors import CborError, EifError

# curve -> COSE algorithm, hash, bytes of one signature half
_SUITES: Final[dict[str, tuple[int, hashes.HashAlgorithm, int]]] = {
    "secp256r1": (-7, hashes.SHA256(), 32),
    "secp384r1": (-35, hashes.SHA384(), 48),
    "secp521r1": (-36, hashes.SHA512(), 66),
}


def sign(image: eif.Image, key_pem: bytes, certificate_pem: bytes) -> eif.Image:
    """Return `image` with a signature section. Raises: EifError when it cannot be signed so."""
    if image.of_type(eif.SectionType.SIGNATURE):
        raise EifError("the image is signed already")
    key = _load_key(key_pem)
    public_key = _load_public_key(certificate_pem)
    if key.public_key() != public_key:
        raise EifError("the certificate is not for this signing key")
    algorithm, digest, half = _suite(public_key)
    protected = cbor.encode({1: algorithm})
    payload = _payload(image)
    der = key.sign(_to_be_signed(protected, payload), ec.ECDSA(digest))
    signature = b"".join(number.to_bytes(half, "big") for number in decode_dss_signature(der))
    message = cbor.encode([protected, {}, payload, signature])
    data = eif.write_signature(certificate_pem, message)
    return image.with_section(eif.Section(eif.SectionType.SIGNATURE, data))


def verify(image: eif.Image) -> x509.Certificate:
    """Return the certificate whose key signed this image's PCR0.

    Whether to trust that certificate is the caller's question; PCR8 answers it at run time.
    Raises: EifError when the image is unsigned, or its signature does not match it.
    """
    sections = image.of_type(eif.SectionType.SIGNATURE)
    if not sections:
        raise EifError("the image is not signed")
    certificate_pem, message = eif.read_signature(sections[0])
    public_key = _load_public_key(certificate_pem)
    algorithm, digest, half = _suite(public_key)
    protected, payload, signature = _read_message_untrusted(message)
    if protected != cbor.encode({1: algorithm}) or len(signature) != 2 * half:
        raise EifError("the signature's algorithm is not the one of its certificate's key")
    if payload != _payload(image):
        raise EifError("the signature is for another PCR0")
    numbers = (int.from_bytes(part, "big") for part in (signature[:half], signature[half:]))
    try:
        public_key.verify(
            encode_dss_signature(*numbers), _to_be_signed(protected, payload), ec.ECDSA(digest)
        )
    except InvalidSignature as error:
        raise EifError("the signature does not verify") from error
    return x509.load_pem_x509_certificate(certificate_pem)


def _payload(image: eif.Image) -> bytes:
    return cbor.encode({"register_index": 0, "register_value": list(eif.measure(image)[0])})


def _to_be_signed(protected: bytes, payload: bytes) -> bytes:
    return cbor.encode(["Signature1", protected, b"", payload])


def _read_message_untrusted(message: bytes) -> tuple[bytes, bytes, bytes]:
    try:
        item = cbor.decode(message)
    except CborError as error:
        raise EifError(f"signature: {error}") from error
    if isinstance(item, list) and len(item) == 4 and item[1] == {}:
        protected, payload, signature = item[0], item[2], item[3]
        if (
            isinstance(protected, bytes)
            and isinstance(payload, bytes)
            and isinstance(signature, bytes)
        ):
            return protected, payload, signature
    raise EifError("the signature is no COSE_Sign1 message")


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EifError("the signing key is no unencrypted PEM key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise EifError("the signing key is no elliptic curve key")
    return key


def _load_public_key(certificate_pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EifError("the signing certificate is no PEM certificate") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise EifError("the signing certificate's key is no elliptic curve key")
    return key


def _suite(key: ec.EllipticCurvePublicKey) -> tuple[int, hashes.HashAlgorithm, int]:
    try:
        return _SUITES[key.curve.name]
    except KeyError:
        raise EifError(f"curve {key.curve.name} is not one of {sorted(_SUITES)}") from None
