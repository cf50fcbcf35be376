"""X.509 chains of attestation documents, verified up to one pinned root.

Every check is explicit and the profile is the narrowest that security modules use: version 3,
P-384, ECDSA with SHA-384, no critical extension but basic constraints and key usage.
Source: RFC 5280 §6; AWS Nitro Enclaves attestation process.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from datetime import datetime
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import SignatureAlgorithmOID

from transport.attestation.evidence_binding import is_same
from transport.errors import AttestationError, MisuseError
from transport.frozen import frozen

MAX_BUNDLE_CERTIFICATES: Final = 8  # AWS sends four; bounds the signatures one message can cost
CACHE_CAPACITY: Final = 64  # bundles change daily per region; a fleet spans few at a time

_Extension = TypeVar("_Extension", x509.BasicConstraints, x509.KeyUsage)


@frozen
class Validity:
    """The span in which every certificate of a chain is valid."""

    not_before: datetime
    not_after: datetime

    def require_contains(self, now: datetime) -> None:
        """Raises: AttestationError ("validity"); MisuseError on a time without zone."""
        if now.tzinfo is None:
            raise MisuseError(f"clock gives {now.isoformat()} without a time zone; use UTC")
        if not self.not_before <= now <= self.not_after:
            raise AttestationError(
                "validity",
                f"the chain is valid from {self.not_before.isoformat()} to "
                f"{self.not_after.isoformat()}, the clock says {now.isoformat()}",
            )

    def narrowed(self, certificate: x509.Certificate) -> "Validity":
        """The part of the span in which the certificate is valid too."""
        return Validity(
            max(self.not_before, certificate.not_valid_before_utc),
            min(self.not_after, certificate.not_valid_after_utc),
        )


@frozen
class VerifiedLeaf:
    """A leaf whose chain reaches the root. Its validity at a clock is still to be checked."""

    public_key: ec.EllipticCurvePublicKey
    validity: Validity


@frozen
class _Issuer:
    certificate: x509.Certificate
    validity: Validity


class ChainVerifier:
    """Verifies leaves up to one root; remembers bundles that passed, never their validity in time.

    Raises: MisuseError where the root itself is not a P-384 certificate authority.
    """

    def __init__(self, root: x509.Certificate) -> None:
        self.root = root
        self._root_der = root.public_bytes(Encoding.DER)
        try:
            _require_issuer(root, num_below=0)
            _require_issued(root, root)
        except AttestationError as error:
            raise MisuseError(f"{_name(root)} cannot be a pinned root: {error.detail}") from error
        self._issuers: OrderedDict[bytes, _Issuer] = OrderedDict()

    def require_root(self, cabundle: Sequence[bytes]) -> None:
        """Checks that the bundle begins with the pinned root. Raises: AttestationError ("root")."""
        if not cabundle or not is_same(cabundle[0], self._root_der):
            found = hashlib.sha256(cabundle[0]).hexdigest() if cabundle else "nothing"
            raise AttestationError(
                "root", f"the bundle begins with {found}, not with {_name(self.root)}"
            )

    def verify(self, certificate: bytes, cabundle: Sequence[bytes]) -> VerifiedLeaf:
        """The leaf, issued through the bundle (root first) by the pinned root.

        Raises: AttestationError ("root" or "chain").
        """
        self.require_root(cabundle)
        issuer = self._verified_issuer(cabundle)
        leaf = _parse(certificate)
        _require_profile(leaf)
        _require_leaf(leaf)
        _require_issued(leaf, issuer.certificate)
        return VerifiedLeaf(_public_key(leaf), issuer.validity.narrowed(leaf))

    def _verified_issuer(self, cabundle: Sequence[bytes]) -> _Issuer:
        key = _bundle_hash(cabundle)
        issuer = self._issuers.get(key)
        if issuer is None:
            issuer = self._verify_bundle(cabundle)
            self._issuers[key] = issuer
            if len(self._issuers) > CACHE_CAPACITY:
                self._issuers.popitem(last=False)
        else:
            self._issuers.move_to_end(key)
        return issuer

    def _verify_bundle(self, cabundle: Sequence[bytes]) -> _Issuer:
        if len(cabundle) > MAX_BUNDLE_CERTIFICATES:
            raise _refused(f"{len(cabundle)} certificates, allowed: {MAX_BUNDLE_CERTIFICATES}")
        last = len(cabundle) - 1
        _require_issuer(self.root, num_below=last)
        issuer = _Issuer(
            self.root, Validity(self.root.not_valid_before_utc, self.root.not_valid_after_utc)
        )
        for position, der in enumerate(cabundle[1:], start=1):
            certificate = _parse(der)
            if certificate.subject == certificate.issuer:
                raise _refused(f"{_name(certificate)} below the root is issued by itself")
            _require_issuer(certificate, num_below=last - position)
            _require_issued(certificate, issuer.certificate)
            issuer = _Issuer(certificate, issuer.validity.narrowed(certificate))
        return issuer


def _bundle_hash(cabundle: Sequence[bytes]) -> bytes:
    """Hashes lengths too, so that no other cut of the same bytes meets a cached bundle."""
    digest = hashlib.sha256()
    for der in cabundle:
        digest.update(len(der).to_bytes(8) + der)
    return digest.digest()


def _refused(detail: str) -> AttestationError:
    return AttestationError("chain", detail)


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()[:120] or "a certificate without name"


def _parse(der: bytes) -> x509.Certificate:
    """A certificate of which every part used here is known to be readable.

    The library parses parts when they are first read: read all of them where errors are expected,
    so that no altered byte raises anything later. Which errors it raises is not documented in
    full, and every one of them means the same: refused.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        _ = (
            certificate.version,
            certificate.signature_algorithm_oid,
            certificate.subject.rfc4514_string(),
            certificate.issuer.rfc4514_string(),
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            certificate.extensions,
            certificate.public_key(),
        )
    except Exception as error:
        raise _refused(f"a certificate cannot be read: {error}") from error
    return certificate


def _require_profile(certificate: x509.Certificate) -> None:
    """Version, algorithm, curve, and no critical extension that is not understood here."""
    if certificate.version is not x509.Version.v3:
        raise _refused(f"{_name(certificate)} is not version 3")
    algorithm = certificate.signature_algorithm_oid
    if algorithm != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise _refused(
            f"{_name(certificate)} is signed with {algorithm.dotted_string}, "
            "only ECDSA with SHA-384 is allowed"
        )
    unknown = [
        extension.oid.dotted_string
        for extension in certificate.extensions
        if extension.critical
        and not isinstance(extension.value, x509.BasicConstraints | x509.KeyUsage)
    ]
    if unknown:
        raise _refused(f"{_name(certificate)} has unknown critical extensions {unknown}")
    _public_key(certificate)


def _public_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _refused(f"{_name(certificate)} has no P-384 public key")
    return key


def _require_issuer(certificate: x509.Certificate, num_below: int) -> None:
    """A certificate that may issue, with `num_below` more authorities between it and the leaf."""
    _require_profile(certificate)
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise _refused(f"{_name(certificate)} is not a certificate authority")
    if constraints.path_length is not None and num_below > constraints.path_length:
        raise _refused(
            f"{num_below} authorities below {_name(certificate)}, "
            f"its path length allows {constraints.path_length}"
        )
    usage = _extension(certificate, x509.KeyUsage)
    if usage is None or not usage.key_cert_sign:
        raise _refused(f"{_name(certificate)} may not sign certificates")


def _require_leaf(certificate: x509.Certificate) -> None:
    """A certificate that signs documents and cannot issue: an authority's key is no leaf's."""
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise _refused(f"leaf {_name(certificate)} is a certificate authority")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is None or not usage.digital_signature or usage.key_cert_sign:
        raise _refused(f"leaf {_name(certificate)} may not sign documents")


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _require_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    """Names chain and the signature is the issuer's."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except InvalidSignature as error:
        raise _refused(f"{_name(certificate)} is not signed by {_name(issuer)}") from error
    except Exception as error:
        raise _refused(f"{_name(certificate)} is not issued by {_name(issuer)}: {error}") from error
