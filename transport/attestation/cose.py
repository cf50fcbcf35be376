"""COSE_Sign1 with ES384 and nothing else: read, verify, sign.

Exactly one algorithm in the protected header and an empty unprotected one: an attacker has nothing
to negotiate, and a document that declares itself unsigned (algorithm -1) is no document.
Source: RFC 9052 §4, RFC 9053 §2.1.
"""

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from transport.attestation import cbor
from transport.errors import AttestationError, MisuseError
from transport.frozen import frozen

COORDINATE_BYTES: Final = 48  # P-384
SIGNATURE_BYTES: Final = 2 * COORDINATE_BYTES

_SIGN1_TAG: Final = b"\xd2"  # tag 18; optional in front of the array
_ALGORITHM: Final = 1  # label of the protected header's only entry
_ES384: Final = -35
_PROTECTED: Final = cbor.encode({_ALGORITHM: _ES384})


@frozen
class Sign1:
    """A well-formed COSE_Sign1; nothing is verified before `verify`."""

    protected: bytes  # the bytes as received: the signature covers them, not their meaning
    payload: bytes
    signature: bytes  # r | s, 48 bytes each

    def verify(self, key: ec.EllipticCurvePublicKey) -> None:
        """Checks the signature under a P-384 key. Raises: AttestationError ("signature")."""
        r = int.from_bytes(self.signature[:COORDINATE_BYTES])
        s = int.from_bytes(self.signature[COORDINATE_BYTES:])
        try:
            key.verify(
                encode_dss_signature(r, s),
                _signed_bytes(self.protected, self.payload),
                ec.ECDSA(hashes.SHA384()),
            )
        except InvalidSignature as error:
            raise AttestationError("signature", "is not the leaf's over this document") from error


def parse(document: bytes) -> Sign1:
    """The parts of a document. Raises: AttestationError ("cbor" or "cose")."""
    value = cbor.decode(document.removeprefix(_SIGN1_TAG))
    match value:
        case [
            bytes() as protected,
            dict() as unprotected,
            bytes() as payload,
            bytes() as signature,
        ]:
            pass
        case _:
            raise AttestationError("cose", "is not [protected, unprotected, payload, signature]")
    header = cbor.decode(protected)
    if not isinstance(header, dict) or header != {_ALGORITHM: _ES384}:
        raise AttestationError("cose", f"protected header is {header!r:.80}, only ES384 is allowed")
    if unprotected:
        raise AttestationError("cose", "unprotected header is not empty")
    if not payload:
        raise AttestationError("cose", "payload is empty")
    if len(signature) != SIGNATURE_BYTES:
        raise AttestationError(
            "cose", f"signature has {len(signature)} bytes, expected {SIGNATURE_BYTES}"
        )
    return Sign1(protected, payload, signature)


def sign(payload: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A document over the payload. Raises: MisuseError where the key is not on P-384."""
    if not isinstance(key.curve, ec.SECP384R1):
        raise MisuseError(f"ES384 needs a P-384 key, got {key.curve.name}")
    der = key.sign(_signed_bytes(_PROTECTED, payload), ec.ECDSA(hashes.SHA384()))
    r, s = decode_dss_signature(der)
    signature = r.to_bytes(COORDINATE_BYTES) + s.to_bytes(COORDINATE_BYTES)
    return cbor.encode([_PROTECTED, {}, payload, signature])


def _signed_bytes(protected: bytes, payload: bytes) -> bytes:
    return cbor.encode(["Signature1", protected, b"", payload])
