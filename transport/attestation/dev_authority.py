"""Development evidence: real documents under a local development authority.

The verifier is the one for enclaves, so that its code runs every day; what is missing is the
hardware behind the key. Whoever can read the authority's file can claim any measurement.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from transport.attestation import cose
from transport.attestation.attestation_document import PCR_BYTES, Document, require_measurements
from transport.attestation.document_verifier import DocumentVerifier, Policy
from transport.attestation.evidence_binding import Binding, EvidenceKind, user_data
from transport.errors import MisuseError
from transport.frozen import frozen
from transport.private_files import create_private, read_private

AUTHORITY_FILE: Final = "authority.pem"  # key and certificate together: no reader sees just one
ROOT_LIFETIME: Final = timedelta(days=3650)
LEAF_LIFETIME: Final = timedelta(hours=3)  # what the NSM gives its own
LEAF_RENEWAL: Final = timedelta(hours=2)
BACKDATING: Final = timedelta(minutes=5)  # a peer's clock may run this much behind
MODULE_ID: Final = "veilpipe-development"


def default_directory(environment: Mapping[str, str]) -> Path:
    """Where this user's development authority lives, by the environment's variables.

    Raises: MisuseError where nothing says which directory is this user's.
    """
    if directory := environment.get("VEILPIPE_DEV_DIR"):
        return Path(directory)
    if state := environment.get("XDG_STATE_HOME"):
        return Path(state) / "veilpipe" / "dev"
    try:
        return Path.home() / ".local" / "state" / "veilpipe" / "dev"
    except RuntimeError as error:  # a container's user without HOME and without an account
        raise MisuseError(
            "this user has no home directory for the development authority; "
            "set VEILPIPE_DEV_DIR to a directory of yours"
        ) from error


@frozen
class DevAuthority:
    """A P-384 root of this machine's development mode."""

    root_cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, now: datetime) -> Self:
        """A fresh authority, held in memory only."""
        key = ec.generate_private_key(ec.SECP384R1())
        name = _named("veilpipe development root")
        # No clock that is set back later shall find its authority not yet valid.
        lifetime = (now - ROOT_LIFETIME, now + ROOT_LIFETIME)
        return cls(_issue(name, key.public_key(), name, key, lifetime, is_authority=True), key)

    @classmethod
    def load_or_create(
        cls, directory: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> Self:
        """The authority in the directory, made there at first (mode 0600, one file, atomic).

        Raises: MisuseError naming the file where it is unusable, not valid by the clock, or where
        others may read or change it: whoever has its key can claim any measurement.
        """
        path = directory / AUTHORITY_FILE
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists():
                cls.create(clock())._publish(path)
            authority = cls._load(path)
        except OSError as error:
            raise MisuseError(
                f"development authority {path} cannot be used: {error.strerror}; "
                "set VEILPIPE_DEV_DIR to a directory of yours"
            ) from error
        authority._require_valid(path, clock())
        return authority

    def _require_valid(self, path: Path, now: datetime) -> None:
        first, last = self.root_cert.not_valid_before_utc, self.root_cert.not_valid_after_utc
        if not first <= now <= last:
            raise MisuseError(
                f"development authority {path} is valid from {first:%Y-%m-%d %H:%M} to "
                f"{last:%Y-%m-%d %H:%M}, and this machine's clock says {now:%Y-%m-%d %H:%M}; "
                "set the clock, or delete the file to make a new one"
            )

    def _publish(self, path: Path) -> None:
        """Writes aside and links: of several processes one wins, all then load the winner's."""
        aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pem += self.root_cert.public_bytes(Encoding.PEM)
        create_private(aside, pem)
        try:
            with suppress(FileExistsError):
                os.link(aside, path)
        finally:
            aside.unlink()

    @classmethod
    def _load(cls, path: Path) -> Self:
        try:
            pem = read_private(path)
        except MisuseError as error:
            raise MisuseError(f"development authority {error}") from error
        try:
            key = load_pem_private_key(pem, password=None)
            root_cert = x509.load_pem_x509_certificate(pem)
        except (ValueError, TypeError) as error:
            raise MisuseError(
                f"development authority {path} cannot be read: {error}; delete it to make a new one"
            ) from error
        if (
            not isinstance(key, ec.EllipticCurvePrivateKey)
            or root_cert.public_key() != key.public_key()
        ):
            raise MisuseError(
                f"development authority {path} holds another key than its certificate's; "
                "delete it to make a new one"
            )
        return cls(root_cert, key)


class DevAttester:
    """Signs documents with the given measurements, as an enclave's security module would.

    Raises: MisuseError where a measurement is not a PCR index with 48 bytes.
    """

    kind = EvidenceKind.DEV

    def __init__(
        self,
        authority: DevAuthority,
        measurements: Mapping[int, bytes],
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        require_measurements(measurements)
        self._authority = authority
        self._root_der = authority.root_cert.public_bytes(Encoding.DER)
        # A document names at least PCR 0; zeros are what an unmeasured enclave reports.
        self._pcrs = MappingProxyType({0: bytes(PCR_BYTES), **measurements})
        self._clock = clock
        self._renew(clock())

    def attest(self, binding: Binding) -> bytes:
        """A signed document bound to the handshake, about 1.5 KB."""
        now = self._clock()
        if not self._issued <= now < self._renewal:  # due, or the clock has been set back
            self._renew(now)
        return cose.sign(
            Document(
                module_id=MODULE_ID,
                timestamp_ms=int(now.timestamp() * 1000),
                pcrs=self._pcrs,
                certificate=self._leaf_der,
                cabundle=(self._root_der,),
                public_key=binding.static_key,
                user_data=user_data(binding),
                nonce=binding.nonce,
            ).encode(),
            self._leaf_key,
        )

    def _renew(self, now: datetime) -> None:
        """A fresh leaf; its key never leaves the process."""
        self._leaf_key = ec.generate_private_key(ec.SECP384R1())
        leaf = _issue(
            _named("veilpipe development leaf"),
            self._leaf_key.public_key(),
            self._authority.root_cert.subject,
            self._authority.key,
            (now - BACKDATING, now + LEAF_LIFETIME),
            is_authority=False,
        )
        self._leaf_der = leaf.public_bytes(Encoding.DER)
        self._issued, self._renewal = now, now + LEAF_RENEWAL


def dev_verifier(
    root_cert: x509.Certificate,
    expected: Mapping[int, bytes] | None,
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> DocumentVerifier:
    """Judges development evidence; `expected` None takes any measurement.

    Zero measurements pass: without hardware, debug mode means nothing.
    """
    return DocumentVerifier(
        EvidenceKind.DEV, root_cert, Policy(expected, allow_debug=True), clock=clock
    )


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _issue(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    lifetime: tuple[datetime, datetime],
    *,
    is_authority: bool,
) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    constraints = x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(lifetime[0])
        .not_valid_after(lifetime[1])
        .add_extension(constraints, critical=True)
        .add_extension(usage, critical=True)
        .sign(issuer_key, hashes.SHA384())
    )
