"""Synthetic certificate chains and documents, and the recorded ones."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from transport.attestation import cose
from transport.attestation.attestation_document import Document
from transport.attestation.evidence_binding import Binding, user_data

NOW = datetime(2030, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


@dataclass
class Node:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def der(self):
        return self.certificate.public_bytes(Encoding.DER)


class Synthetic:
    """Makes certificates, right by default and wrong where asked."""

    now = NOW

    def __init__(self):
        self.pcrs = {0: b"\x10" * 48, 1: b"\x11" * 48, 2: b"\x12" * 48, 31: b"\x1f" * 48}

    def issue(
        self,
        name,
        issuer=None,
        *,
        ca=True,
        path_length=None,
        curve=None,
        algorithm=None,
        cert_sign=None,
        digital_signature=None,
        usage=True,
        constraints=True,
        extra=None,
        not_before=NOW - DAY,
        not_after=NOW + DAY,
        signing_key=None,
        issuer_name=None,
    ):
        key = ec.generate_private_key(curve or ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        parent = issuer.certificate.subject if issuer else subject
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer_name or parent)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
        )
        if constraints:
            value = x509.BasicConstraints(ca=ca, path_length=path_length if ca else None)
            builder = builder.add_extension(value, critical=True)
        if usage:
            signs = not ca if digital_signature is None else digital_signature
            issues = ca if cert_sign is None else cert_sign
            rest = dict.fromkeys(
                ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
                False,
            )
            value = x509.KeyUsage(
                digital_signature=signs,
                key_cert_sign=issues,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
                **rest,
            )
            builder = builder.add_extension(value, critical=True)
        if extra is not None:
            builder = builder.add_extension(extra, critical=True)
        signing_key = signing_key or (issuer.key if issuer else key)
        return Node(builder.sign(signing_key, algorithm or hashes.SHA384()), key)

    def chain(self):
        """Root, two intermediates and a leaf, as a security module has them."""
        root = self.issue("root")
        upper = self.issue("upper", root, path_length=1)
        lower = self.issue("lower", upper, path_length=0)
        return root, upper, lower, self.issue("leaf", lower, ca=False)

    def document(self, nodes, binding=None, **changes):
        """The payload that the chain's leaf would sign."""
        *bundle, leaf = nodes
        fields = {
            "module_id": "i-0-enc0",
            "timestamp_ms": int(NOW.timestamp() * 1000),
            "pcrs": self.pcrs,
            "certificate": leaf.der,
            "cabundle": tuple(node.der for node in bundle),
        }
        if binding is not None:
            fields["user_data"] = user_data(binding)
            fields["public_key"] = binding.static_key
            fields["nonce"] = binding.nonce
        return Document(**{**fields, **changes})

    def evidence(self, nodes, binding=None, **changes):
        """The signed document."""
        return cose.sign(self.document(nodes, binding, **changes).encode(), nodes[-1].key)


@pytest.fixture(scope="session")
def synthetic():
    return Synthetic()


@pytest.fixture(scope="session")
def chain(synthetic):
    return synthetic.chain()


@pytest.fixture
def binding():
    return Binding(b"stage/1", b"h" * 32, b"s" * 32, b"n" * 32)


@pytest.fixture(scope="session")
def recorded():
    """Reads a recorded document: bytes and the time it states."""
    directory = Path(__file__).parents[4] / "shared" / "fixtures" / "nitro"
    if not directory.is_dir():
        pytest.skip(f"recorded documents are absent: {directory}")
    return lambda name: (directory / name).read_bytes()
