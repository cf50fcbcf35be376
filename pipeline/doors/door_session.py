"""A client's session with a door. Sans-IO: requests out, answers in, nothing before evidence.

A session is a chain of steps under one key, each sealed once and, where its answer is lost, sent
again as it was. When a door no longer knows it, it begins anew under a fresh key, and whoever has
its tokens sends them again.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.codecs.base import ActivationCodec
from pipeline.doors.bodies import Bodies, Frame, Place, request_digest
from pipeline.doors.door_evidence import TrustedKey, verify_key, wrong_key_nonce
from pipeline.doors.grants import Grant, derive, grant_info
from pipeline.doors.kept_state import KeptMark, parse_mark
from pipeline.doors.messages import AttestRequest, AttestResponse, InferRequest, InferResponse
from pipeline.dtypes import Floats
from pipeline.errors import MessageError, SessionError
from transport.attestation.evidence_binding import NONCE_BYTES
from transport.attestation.interfaces import Verifier
from transport.tensor_frames import DType, Tensor

_ID_BYTES = 16


@dataclass(frozen=True, slots=True, repr=False)
class SessionName:
    """What a session is called to doors, and the 32 bytes that make it its owner's."""

    session_id: str
    owner: bytes

    @classmethod
    def of(cls, name: str, secret: bytes) -> "SessionName":
        """Of a name and a secret of its user; who has only the one learns nothing of the other."""
        own = derive(secret, b"session " + os.fsencode(name))  # as it came from a command line
        return cls(derive(own, b"id")[:_ID_BYTES].hex(), derive(own, b"owner"))

    @classmethod
    def of_nobody(cls) -> "SessionName":
        """One that nobody comes back to."""
        return cls.of("", os.urandom(32))


@dataclass(frozen=True, slots=True)
class DoorPolicy:
    """What a door has to show: the core, and evidence that one of these verifiers believes."""

    core_hash: bytes
    verifiers: Sequence[Verifier]

    def ask(self) -> AttestRequest:
        """Ask for a key, under a fresh nonce."""
        return AttestRequest(os.urandom(NONCE_BYTES))

    def answered(self, request: AttestRequest, response: AttestResponse) -> TrustedKey:
        """The door's key. Raises SessionError where its evidence does not pass."""
        return verify_key(response, self.core_hash, request.nonce, self.verifiers)

    def corrected(self, request: InferRequest, key: AttestResponse) -> TrustedKey:
        """The key of the worker that a request has come to. Raises SessionError as above."""
        return verify_key(key, self.core_hash, wrong_key_nonce(request), self.verifiers)


class DoorSession:
    """Seals steps to a key that can be trusted, and opens their answers."""

    def __init__(
        self,
        name: SessionName,
        policy: DoorPolicy,
        codec: ActivationCodec,
        key: TrustedKey,
        mark: KeptMark | None = None,
    ) -> None:
        """`mark`: of what a door has stored before. Raises SessionError for a key that is none."""
        self._name, self._core_hash, self._codec = name, policy.core_hash, codec
        self._key = key
        self._due: tuple[InferRequest, Place, bytes] | None = None
        self.restart(mark)

    @property
    def num_stored(self) -> int:
        """Positions that a door may find in its store."""
        return 0 if self.mark is None else self.mark.mark.position

    def restart(self, mark: KeptMark | None = None) -> None:
        """Begin anew under a fresh key, from nothing, or from what is stored up to a mark."""
        # What the door has put into its store, as it said with its last answer.
        self.mark = mark
        self._grant = Grant.fresh(self._name.owner)
        self._bodies = Bodies(self._grant.session_key, self._core_hash)
        self._next_step = 0
        self._due = None
        self._sealed_grant = self._seal_grant()

    def forgotten(self) -> None:
        """The door knows nothing of the session; nor of its mark, where it was to begin there."""
        if self._next_step == 1:
            self.mark = None

    def seal(self, position: int, tensors: Sequence[Tensor], num_rows: int) -> InferRequest:
        """The next step: rows at `position`, as the codec has encoded them.

        Of these the last `num_rows` come back. What the door holds behind `position` is taken back;
        without rows that is all.
        """
        num_tokens = tensors[0].spec.shape[0] if tensors else 0
        place = Place(self._next_step, position, num_rows)
        shape = (num_tokens, self._codec.hidden_dim)
        frame = Frame(self._name.session_id, self._codec.name, shape)
        parts = [tensor.data for tensor in tensors]
        if self._next_step == 0 and self.mark is not None:
            parts.append(memoryview(self.mark.pack()))
        sealed = self._bodies.seal_request(frame, place, b"".join(parts))
        self._next_step += 1
        request = InferRequest(
            cloaked_embedding=sealed,
            encrypted_session_key=self._sealed_grant,
            nonce=place.pack(),
            shape=shape,
            dtype=frame.dtype,
            session_id=frame.session_id,
        )
        self._due = request, place, request_digest(frame, place, sealed)
        return request

    def reseal(self, key: TrustedKey) -> InferRequest:
        """The step under way once more, to another worker's key. The step itself is as it was.

        Raises SessionError as above.
        """
        assert self._due is not None, "a step is under way"
        request, place, digest = self._due
        self._key = key
        self._sealed_grant = self._seal_grant()
        request = replace(request, encrypted_session_key=self._sealed_grant)
        self._due = request, place, digest
        return request

    def open(self, response: InferResponse) -> Floats:
        """The rows [num_rows, hidden] of the step under way.

        Raises MessageError for what is no answer to it.
        """
        assert self._due is not None, "a step is under way"
        request, place, digest = self._due
        shape = (place.num_rows, self._codec.hidden_dim)
        if response.error:
            raise MessageError(f"the door answers with an error: {response.error[:200]}")
        if tuple(response.shape) != shape or response.dtype != DType.F32.name:
            raise MessageError(
                f"the door answers with {response.dtype[:40]} {tuple(response.shape)[:4]}, "
                f"expected F32 {shape}"
            )
        if response.tokens_processed != request.shape[0]:
            raise MessageError(
                f"the door has processed {response.tokens_processed} tokens of {request.shape[0]}"
            )
        frame = Frame(request.session_id, response.dtype, shape)
        plain = self._bodies.open_answer(frame, digest, request.shape[0], response.output)
        num_bytes = DType.F32.itemsize * shape[0] * shape[1]
        if len(plain) < num_bytes:
            raise MessageError(f"the door answers with {len(plain)} bytes for {shape}")
        self.mark = parse_mark(bytes(plain[num_bytes:]))
        self._due = None
        return np.frombuffer(plain[:num_bytes], "<f4").reshape(shape)

    def _seal_grant(self) -> bytes:
        info = grant_info(self._core_hash, self._name.session_id)
        try:
            return self._grant.seal(self._key.public_key, info)
        except ValueError as error:  # 32 bytes that are no point
            raise SessionError("the door's key is none that can be sealed to") from error
