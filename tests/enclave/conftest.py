"""Small images and keys for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from enclave import eif


@pytest.fixture
def image() -> eif.Image:
    """Every measured kind of section, two ramdisks, and metadata."""
    return eif.Image(
        (
            eif.Section(eif.SectionType.KERNEL, b"kernel" * 7),
            eif.Section(eif.SectionType.CMDLINE, b"console=ttyS0"),
            eif.Section(eif.SectionType.RAMDISK, b"base system" * 5),
            eif.Section(eif.SectionType.RAMDISK, b"stage files" * 3),
            eif.Section(eif.SectionType.METADATA, b'{"ImageName":"test"}'),
        ),
        default_memory_bytes=1 << 30,
        default_cpus=2,
    )


@pytest.fixture(scope="session")
def signer() -> Callable[[ec.EllipticCurve], tuple[bytes, bytes]]:
    """Return (private key PEM, certificate PEM) for a curve."""

    @cache
    def make(curve_name: str) -> tuple[bytes, bytes]:
        curve = {"secp256r1": ec.SECP256R1, "secp384r1": ec.SECP384R1, "secp521r1": ec.SECP521R1}
        key = ec.generate_private_key(curve[curve_name]())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "image signer")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(2036, 1, 1, tzinfo=UTC))
            .sign(key, hashes.SHA384())
        )
        encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        key_pem = key.private_bytes(encoding, private, serialization.NoEncryption())
        return key_pem, certificate.public_bytes(encoding)

    return lambda curve: make(curve.name)
