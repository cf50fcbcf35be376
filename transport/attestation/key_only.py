"""Evidence of a host without a security module: its static key, listed by the verifier."""

from transport.attestation.evidence_binding import (
    STATIC_KEY_BYTES,
    Attested,
    Binding,
    EvidenceKind,
    is_same,
)
from transport.errors import AttestationError, MisuseError


class KeyOnlyAttester:
    """Shows nothing but the static key that the handshake already proves possession of."""

    kind = EvidenceKind.KEY_ONLY

    def attest(self, binding: Binding) -> bytes:  # noqa: ARG002  (the Protocol's shape)
        """An empty document: the handshake itself binds key, role and nonce."""
        return b""


class AnyKeyVerifier:
    """Accepts any static key: for links on which a pre-shared secret is the proof."""

    kind = EvidenceKind.KEY_ONLY

    def verify(self, evidence: bytes, binding: Binding) -> Attested:  # noqa: ARG002  (as above)
        """Vouches for nothing but the key itself. Raises: AttestationError."""
        _require_empty(evidence)
        return Attested(kind=self.kind, measurements={})


class KeyOnlyVerifier:
    """Accepts exactly the static public keys it was given.

    Raises: MisuseError on a key that is not 32 bytes. An empty set refuses everyone.
    """

    kind = EvidenceKind.KEY_ONLY

    def __init__(self, allowed_keys: frozenset[bytes]) -> None:
        for key in allowed_keys:
            if len(key) != STATIC_KEY_BYTES:
                raise MisuseError(
                    f"allowed key {key.hex()!r} has {len(key)} bytes, expected {STATIC_KEY_BYTES}"
                )
        self._allowed_keys = allowed_keys

    def verify(self, evidence: bytes, binding: Binding) -> Attested:
        """Vouches for a listed key, without measurements. Raises: AttestationError."""
        _require_empty(evidence)
        # Every key is compared: stopping at the first match would time its place in the list.
        matches = [is_same(key, binding.static_key) for key in self._allowed_keys]
        if not any(matches):
            raise AttestationError(
                "key", f"static key {binding.static_key.hex()} is not among the allowed keys"
            )
        return Attested(kind=self.kind, measurements={})


def _require_empty(evidence: bytes) -> None:
    if evidence:
        raise AttestationError(
            "evidence", f"key-only evidence must be empty, got {len(evidence)} bytes"
        )
