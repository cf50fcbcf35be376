"""The two Protocols through which evidence is made and judged."""

from typing import Protocol

from transport.attestation.evidence_binding import Attested, Binding, EvidenceKind


class Attester(Protocol):
    """Makes evidence about the process it runs in."""

    @property
    def kind(self) -> EvidenceKind:
        """The kind this attester makes."""
        ...

    def attest(self, binding: Binding) -> bytes:
        """The evidence document for one handshake; empty where the key itself is the evidence.

        Raises: DeviceError where a security module does not answer.
        """
        ...


class Verifier(Protocol):
    """Judges a peer's evidence under local policy."""

    @property
    def kind(self) -> EvidenceKind:
        """The kind this verifier judges."""
        ...

    def verify(self, evidence: bytes, binding: Binding) -> Attested:
        """What the evidence proves. Raises: AttestationError naming the failed check."""
        ...
