"""What is asked of a door and what it answers, whichever transport carries it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from pipeline.errors import PipelineError

# Whole bodies travel without a copy: whatever holds bytes will do.
Payload = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class InferRequest:
    """The fields of the older proto's request, under its names; DOORS.md says what each means."""

    cloaked_embedding: Payload
    encrypted_session_key: Payload
    nonce: Payload
    shape: Sequence[int]
    dtype: str
    session_id: str
    max_new_tokens: int = 0
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class InferResponse:
    """The fields of the older proto's answer; `nonce` travels over HTTP only."""

    output: Payload
    shape: Sequence[int]
    dtype: str
    tokens_processed: int
    error: str = ""
    nonce: Payload = b""


@dataclass(frozen=True, slots=True)
class AttestRequest:
    """A client's fresh nonce, of 32 bytes."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class AttestResponse:
    """The door's HPKE public key of now, and evidence that a worker of this core made it."""

    public_key: bytes
    core_hash: bytes
    evidence_kind: str
    evidence: bytes


class DoorFault(Enum):
    """Why a door refuses; each transport has its own code for it."""

    INVALID = "invalid"  # HTTP 400, gRPC INVALID_ARGUMENT: wrong shape, dtype, name, field
    UNAUTHENTIC = "unauthentic"  # 403, PERMISSION_DENIED: a body that does not open
    WRONG_KEY = "wrong_key"  # 409, FAILED_PRECONDITION: sealed to another worker's key
    CONFLICT = "conflict"  # 409, ABORTED: replayed, reordered, or another client's session
    UNKNOWN_SESSION = "unknown_session"  # 404, NOT_FOUND: to be rebuilt from tokens
    TOO_LARGE = "too_large"  # 413, RESOURCE_EXHAUSTED
    BUSY = "busy"  # 429, RESOURCE_EXHAUSTED: no slot is free
    TOO_SLOW = "too_slow"  # 408, DEADLINE_EXCEEDED: a body that does not arrive in time
    UNAVAILABLE = "unavailable"  # 503, UNAVAILABLE: its store is down


class DoorError(PipelineError):
    """A door refuses a request. With WRONG_KEY goes what its client has to seal to instead."""

    def __init__(self, fault: DoorFault, detail: str, key: AttestResponse | None = None) -> None:
        super().__init__(detail)
        self.fault = fault
        self.key = key


class Door(Protocol):
    """The one handler behind all transports; also what a client has of a door far away."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run one step of a session. Raises DoorError."""

    async def attest(self, request: AttestRequest) -> AttestResponse:
        """Show which key to seal to, and that a worker of the right core holds it."""
