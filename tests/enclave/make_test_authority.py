"""Write a throw-away authority like the one behind a real security module, for tests only.

    make_test_authority.py DIRECTORY

leaves root.pem, chain-0.der (the root), chain-1.der, leaf.der, leaf.pem and key.pem (the leaf's)
there: what the emulated module signs attestation documents with.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).replace(microsecond=0)
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in ("root", "zone", "leaf")}
    root = certificate("root", keys["root"], "root", keys["root"], now, path_length=2)
    zone = certificate("zone", keys["zone"], "root", keys["root"], now, path_length=0)
    leaf = certificate("leaf", keys["leaf"], "zone", keys["zone"], now, path_length=None)
    for name, data in {
        "root.pem": root.public_bytes(Encoding.PEM),
        "chain-0.der": root.public_bytes(Encoding.DER),
        "chain-1.der": zone.public_bytes(Encoding.DER),
        "leaf.pem": leaf.public_bytes(Encoding.PEM),
        "leaf.der": leaf.public_bytes(Encoding.DER),
        "key.pem": keys["leaf"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }.items():
        (directory / name).write_bytes(data)


def certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    *,
    path_length: int | None,
) -> x509.Certificate:
    is_ca = path_length is not None
    signs = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key
    return (
        x509.CertificateBuilder()
        .subject_name(name_of(subject))
        .issuer_name(name_of(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=365 if is_ca else 0, hours=3))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=path_length), critical=True)
        .add_extension(signs, critical=True)
        .add_extension(identifier(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .sign(issuer_key, hashes.SHA384())
    )


def name_of(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "veilpipe test"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"test {common_name}"),
        ]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
