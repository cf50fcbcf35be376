"""Asking a running stage for its evidence, to be judged by hand. Nothing else is said to it."""

from dataclasses import dataclass

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.manifest import Manifest
from pipeline.errors import SessionError
from pipeline.protocol.links import CONTROL_LIMITS
from pipeline.protocol.peer_connections import (
    CONTROL_EPOCH,
    ORCHESTRATOR,
    close_quietly,
    connect_retrying,
    describe,
)
from transport.attestation.evidence_binding import Attested, Binding, EvidenceKind
from transport.attestation.key_only import KeyOnlyAttester
from transport.errors import TransportError
from transport.handshake import Credentials, Link, LinkKind, Role, RoleKind


@dataclass(slots=True)
class _Recorder:
    """Believes any document and keeps it: fit for looking at one, never for trusting a peer."""

    evidence: bytes = b""
    binding: Binding | None = None

    @property
    def kind(self) -> EvidenceKind:
        return EvidenceKind.NITRO

    def verify(self, evidence: bytes, binding: Binding) -> Attested:
        self.evidence, self.binding = evidence, binding
        return Attested(EvidenceKind.NITRO, {})


async def fetch_evidence(
    manifest: Manifest, stage_idx: int, key: X25519PrivateKey
) -> tuple[bytes, Binding]:
    """A stage's document, fresh for this handshake, and what it has to be bound to.

    Waits for a stage that is not up; cancel to stop. Raises SessionError.
    """
    endpoint = manifest.endpoint(stage_idx).control.to_endpoint()
    role = Role(RoleKind.STAGE, stage_idx)
    link = Link(LinkKind.CONTROL, ORCHESTRATOR, role, manifest.core_hash(), CONTROL_EPOCH)
    recorder = _Recorder()
    credentials = Credentials(key, KeyOnlyAttester(), (recorder,))
    try:
        channel = await connect_retrying(
            lambda: endpoint, link, credentials, CONTROL_LIMITS, lambda _: None
        )
    except (TransportError, trio.EndOfChannel, trio.TooSlowError) as error:
        raise SessionError(f"stage {stage_idx} at {endpoint}: {describe(error)}") from error
    await close_quietly(channel)
    assert recorder.binding is not None  # a handshake without evidence does not end well
    return recorder.evidence, recorder.binding
