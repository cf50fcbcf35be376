"""Judges attestation documents of AWS Nitro Enclaves: named checks, one after the other.

The same code judges development evidence; only the root and the kind differ.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from types import MappingProxyType
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from transport.attestation import attestation_document, cose
from transport.attestation.certificate_chain import ChainVerifier, VerifiedLeaf
from transport.attestation.evidence_binding import (
    Attested,
    Binding,
    EvidenceKind,
    is_same,
    user_data,
)
from transport.errors import AttestationError, MisuseError
from transport.frozen import frozen

MAX_EVIDENCE_BYTES: Final = 16 * 1024  # an NSM answers with at most 12 KiB
# The nonce proves freshness; the timestamp only has to be sane. Clocks of a user's machine and of
# an enclave, which takes the time from its host, agree within minutes at best.
CLOCK_SKEW: Final = timedelta(minutes=5)
AWS_ROOT_SHA256: Final = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
_ZERO_PCR: Final = bytes(attestation_document.PCR_BYTES)


@frozen
class CheckResult:
    """One named check of a document: what it found, or why it failed."""

    name: str
    ok: bool
    detail: str


@frozen
class Policy:
    """What measurements are accepted. `expected` None compares nothing: never for production."""

    expected: Mapping[int, bytes] | None  # PCR index -> 48 bytes
    allow_debug: bool = False


def aws_root() -> x509.Certificate:
    """The root of AWS Nitro Enclaves, pinned here by its hash as well as by its bytes.

    Raises: MisuseError where the two differ.
    """
    pem = files("transport.attestation").joinpath("aws_nitro_root_g1.pem").read_bytes()
    root = x509.load_pem_x509_certificate(pem)
    found = hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()
    if found != AWS_ROOT_SHA256:
        raise MisuseError(f"pinned root has sha256 {found}, expected {AWS_ROOT_SHA256}; reinstall")
    return root


class _Examination:
    """One document on its way through the checks; later ones need what earlier ones read."""

    def __init__(
        self,
        evidence: bytes,
        chains: ChainVerifier,
        now: datetime,
        policy: Policy,
        binding: Binding | None,
    ) -> None:
        self._evidence = evidence
        self._chains = chains
        self._now = now
        self._policy = policy
        self._binding = binding
        self._sign1: cose.Sign1 | None = None
        self._document: attestation_document.Document | None = None
        self._leaf: VerifiedLeaf | None = None

    def results(self) -> Iterator[CheckResult]:
        """Runs check after check; who stops at a failed one runs no further."""
        for name, check in self._checks():
            try:
                detail = check()
            except AttestationError as error:
                yield CheckResult(name, ok=False, detail=error.detail)
            else:
                yield CheckResult(name, ok=True, detail=detail)

    @property
    def pcrs(self) -> Mapping[int, bytes]:
        return self._read_document().pcrs

    def _checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "cose", self._check_cose
        yield "document", self._check_document
        yield "root", self._check_root
        yield "chain", self._check_chain
        yield "validity", self._check_validity
        yield "signature", self._check_signature
        yield "timestamp", self._check_timestamp
        yield "debug", self._check_debug
        if self._policy.expected is not None:
            yield "pcrs", self._check_pcrs
        if self._binding is not None:
            binding = self._binding
            yield "user_data", lambda: self._check_user_data(binding)
            yield "public_key", lambda: self._check_public_key(binding)
            yield "nonce", lambda: self._check_nonce(binding)

    def _check_cose(self) -> str:
        if len(self._evidence) > MAX_EVIDENCE_BYTES:
            raise AttestationError(
                "cose", f"document has {len(self._evidence)} bytes, allowed: {MAX_EVIDENCE_BYTES}"
            )
        self._sign1 = cose.parse(self._evidence)
        return f"COSE_Sign1 with ES384, {len(self._evidence)} bytes"

    def _check_document(self) -> str:
        self._document = attestation_document.parse(self._read_sign1().payload)
        return f"module {self._document.module_id}"

    def _check_root(self) -> str:
        self._chains.require_root(self._read_document().cabundle)
        return self._chains.root.subject.rfc4514_string()

    def _check_chain(self) -> str:
        read = self._read_document()
        self._leaf = self._chains.verify(read.certificate, read.cabundle)
        return f"{len(read.cabundle) + 1} certificates"

    def _check_validity(self) -> str:
        validity = self._read_leaf().validity
        validity.require_contains(self._now)
        return f"until {validity.not_after.isoformat()}"

    def _check_signature(self) -> str:
        self._read_sign1().verify(self._read_leaf().public_key)
        return "the leaf's"

    def _check_timestamp(self) -> str:
        milliseconds = self._read_document().timestamp_ms
        try:
            made = datetime.fromtimestamp(milliseconds / 1000, UTC)
        except (ValueError, OverflowError, OSError) as error:
            raise AttestationError("timestamp", f"{milliseconds} ms is no date") from error
        if abs(made - self._now) > CLOCK_SKEW:
            raise AttestationError(
                "timestamp",
                f"document is of {made.isoformat()}, the clock says {self._now.isoformat()}, "
                f"allowed apart: {CLOCK_SKEW}",
            )
        return made.isoformat()

    def _check_debug(self) -> str:
        """A debug-mode enclave reports zeros: its console shows the host what it computes."""
        pcr0 = self.pcrs.get(0)
        if pcr0 is None:
            raise AttestationError("debug", "PCR 0 is missing")
        if not is_same(pcr0, _ZERO_PCR):
            return "no debug mode"
        if not self._policy.allow_debug:
            raise AttestationError("debug", "PCR 0 is zero: the enclave runs in debug mode")
        return "debug mode, which was explicitly allowed"

    def _check_pcrs(self) -> str:
        expected = self._policy.expected
        if not expected:
            raise AttestationError("pcrs", "no measurements are pinned to compare with")
        wrong = [
            index
            for index, digest in sorted(expected.items())
            if not is_same(self.pcrs.get(index, b""), digest)
        ]
        if wrong:
            found = self.pcrs.get(wrong[0])
            raise AttestationError(
                "pcrs",
                f"PCR {', '.join(map(str, wrong))} differ; PCR {wrong[0]} is "
                f"{found.hex() if found else 'missing'}, expected {expected[wrong[0]].hex()}",
            )
        return f"PCR {', '.join(map(str, sorted(expected)))} as expected"

    def _check_user_data(self, binding: Binding) -> str:
        """Ties the document to this role in this handshake: neither relayed nor of another role."""
        return _compare("user_data", self._read_document().user_data, user_data(binding))

    def _check_public_key(self, binding: Binding) -> str:
        """Ties the document to the static key that the handshake authenticates."""
        return _compare("public_key", self._read_document().public_key, binding.static_key)

    def _check_nonce(self, binding: Binding) -> str:
        """Ties the document to the verifier's own ephemeral key: no earlier document passes."""
        return _compare("nonce", self._read_document().nonce, binding.nonce)

    def _read_sign1(self) -> cose.Sign1:
        if self._sign1 is None:
            raise AttestationError("cose", "not judged: the envelope could not be read")
        return self._sign1

    def _read_document(self) -> attestation_document.Document:
        if self._document is None:
            raise AttestationError("document", "not judged: the document could not be read")
        return self._document

    def _read_leaf(self) -> VerifiedLeaf:
        if self._leaf is None:
            raise AttestationError("chain", "not judged: the chain could not be verified")
        return self._leaf


def _compare(name: str, found: bytes | None, expected: bytes) -> str:
    if found is None:
        raise AttestationError(name, "is missing")
    if not is_same(found, expected):
        raise AttestationError(name, "is not bound to this handshake")
    return "bound to this handshake"


def read_document(evidence: bytes) -> attestation_document.Document:
    """What a document says, unverified: to show, never to trust. Raises: AttestationError."""
    return attestation_document.parse(cose.parse(evidence).payload)


def examine(
    evidence: bytes,
    *,
    root: x509.Certificate,
    now: datetime,
    expected: Mapping[int, bytes] | None,
    allow_debug: bool = False,
    binding: Binding | None = None,
) -> list[CheckResult]:
    """Every check of a document by name; those that cannot run fail and say why.

    `expected` None leaves out the comparison of measurements, `binding` None that of the handshake.
    Raises: MisuseError on an unusable root or clock.
    """
    policy = Policy(expected, allow_debug)
    return list(_Examination(evidence, ChainVerifier(root), now, policy, binding).results())


class DocumentVerifier:
    """Accepts a document only if every check of `examine` passes, binding included.

    Raises: MisuseError where a pinned measurement is not a PCR index with 48 bytes.
    """

    def __init__(
        self,
        kind: EvidenceKind,
        root: x509.Certificate,
        policy: Policy,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        attestation_document.require_measurements(policy.expected or {})
        self._kind = kind
        self._policy = policy
        self._clock = clock
        self._chains = ChainVerifier(root)

    @property
    def kind(self) -> EvidenceKind:
        """The kind this verifier judges."""
        return self._kind

    def verify(self, evidence: bytes, binding: Binding) -> Attested:
        """The measurements, once every check has passed. Raises: AttestationError at the first."""
        examination = _Examination(evidence, self._chains, self._clock(), self._policy, binding)
        for result in examination.results():
            if not result.ok:
                raise AttestationError(result.name, result.detail)
        return Attested(self._kind, MappingProxyType(dict(examination.pcrs)))


class NitroVerifier(DocumentVerifier):
    """Judges documents of Nitro Enclaves against pinned measurements.

    Raises: MisuseError without measurements: an enclave that may run anything proves nothing.
    """

    def __init__(
        self,
        root: x509.Certificate,
        expected: Mapping[int, bytes],
        *,
        clock: Callable[[], datetime],
        allow_debug: bool = False,
    ) -> None:
        if not expected:
            raise MisuseError("no measurements are pinned for this enclave; pin at least PCR 0")
        policy = Policy(MappingProxyType(dict(expected)), allow_debug)
        super().__init__(EvidenceKind.NITRO, root, policy, clock=clock)
