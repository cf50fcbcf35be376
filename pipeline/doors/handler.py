"""The one handler behind all transports: a client-split shard, a slot for each session."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hmac import compare_digest

import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from pipeline.agreement.manifest import Manifest
from pipeline.doors.bodies import NONCE_BYTES, Bodies, Frame
from pipeline.doors.door_evidence import show_key, wrong_key_nonce
from pipeline.doors.door_keys import DoorKeys, WrongKey
from pipeline.doors.grants import Grant, grant_info
from pipeline.doors.kept_state import KeptState, parse_mark
from pipeline.doors.messages import (
    AttestRequest,
    AttestResponse,
    DoorError,
    DoorFault,
    InferRequest,
    InferResponse,
)
from pipeline.doors.request_checks import Question, RequestLimits
from pipeline.doors.session_table import Answered, Computed, Session, SessionTable
from pipeline.doors.step_batcher import StepBatcher, Work
from pipeline.dtypes import Floats
from pipeline.errors import InputError, MessageError, StateRefused, StoreError
from pipeline.models.registry import ModelShard
from pipeline.protocol.batch import Segment
from pipeline.sessions.kv_store import KVStore
from pipeline.sessions.sealing import Place
from pipeline.stage.session_admission import MAX_STEP_TOKENS
from pipeline.tasks import open_tasks
from transport.attestation.interfaces import Attester
from transport.tensor_frames import DType

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1800.0
# How often is looked for sessions that nobody uses any more, in parts of that time.
_LOOKS = 8
ANSWER_DTYPE = DType.F32.name


@dataclass(frozen=True, slots=True)
class DoorSetup:
    """All that a door is, whoever asks. Raises InputError for a shard that no door can serve."""

    manifest: Manifest
    shard: ModelShard
    attester: Attester
    # Sessions at once, and the positions that each has room for.
    num_sessions: int
    max_seq_len: int
    idle_seconds: float = IDLE_SECONDS
    # Opens what older clients seal by RSA-OAEP. None: they are refused.
    older_key: RSAPrivateKey | None = None
    # Where sessions are kept beyond this process, sealed under their owners' keys. None: nowhere.
    store: KVStore | None = None
    clock: Callable[[], float] = trio.current_time

    def __post_init__(self) -> None:
        shard, longest = self.shard, self.manifest.activation_spec.max_seq_len
        if not self.manifest.has_client_ends or shard.is_first or shard.is_last:
            raise InputError(
                "a door serves a shard whose embedding and head are the client's; "
                "`pipeline-orch plan --split client` writes such a manifest"
            )
        if (shard.layer_start, shard.layer_end) != (0, shard.config.num_layers):
            raise InputError(
                f"a door serves all {shard.config.num_layers} layers, and this shard has "
                f"{shard.layer_start} to {shard.layer_end}; plan with --stages 1"
            )
        if not 0 < self.max_seq_len <= longest or self.num_sessions < 1:
            raise InputError(
                f"a door of {self.num_sessions} sessions of {self.max_seq_len} positions; "
                f"the model has {longest}"
            )


@asynccontextmanager
async def open_door(setup: DoorSetup) -> AsyncIterator["DoorHandler"]:
    """A door that answers while the context is open; then all that sessions wrote is zeroed.

    Raises InputError where this machine has no memory for its sessions.
    """
    try:
        handler = DoorHandler(setup)
    except MemoryError as error:
        raise InputError(
            f"no memory for {setup.num_sessions} sessions of {setup.max_seq_len} positions"
        ) from error
    try:
        async with open_tasks() as tasks:
            tasks.start_soon(handler.serve)
            yield handler
            tasks.cancel_scope.cancel()
    finally:
        handler.release()


class DoorHandler:
    """Opens requests, runs their steps, seals answers. Transports call it, many at a time."""

    def __init__(self, setup: DoorSetup) -> None:
        codec = setup.manifest.activation_spec.codec
        self._core_hash = setup.manifest.core_hash()
        self._attester = setup.attester
        self._keys = DoorKeys(setup.clock, setup.older_key)
        self._limits = RequestLimits(codec, setup.max_seq_len, MAX_STEP_TOKENS)
        self._batcher = StepBatcher(
            setup.shard, setup.num_sessions, setup.max_seq_len, MAX_STEP_TOKENS
        )
        self._cache = self._batcher.core.cache
        self._idle_seconds = setup.idle_seconds
        self._store = setup.store
        shard = setup.shard
        self._place = partial(
            Place,
            core_hash=self._core_hash,
            layer_start=shard.layer_start,
            layer_end=shard.layer_end,
            precision=shard.precision,
            kernels=shard.kernels.name,
        )
        self._sessions = SessionTable(
            setup.num_sessions,
            setup.idle_seconds,
            setup.clock,
            lambda slot: self._cache.truncate(slot, 0),
        )

    async def attest(self, request: AttestRequest) -> AttestResponse:
        """The key of now, with evidence for this client's nonce. Raises DoorError."""
        return show_key(self._keys.public_key(), self._core_hash, request.nonce, self._attester)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run one step of a session. Raises DoorError."""
        question = self._limits.check(request)
        grant = self._open_grant(request)
        session_id = question.frame.session_id
        async with self._sessions.turn(session_id):
            session = await self._session(question, grant)
            if question.place.step == session.next_step:
                await self._run(session, question)
            answer = await self._answer(session, question)
            self._sessions.touch(session, bytes(request.encrypted_session_key))
            if question.is_last:
                self._sessions.end(session_id)
                if session.kept is not None:
                    await session.kept.forget()
            return answer

    async def serve(self) -> None:
        """Compute, and forget idle sessions, until cancelled."""
        async with open_tasks() as tasks:
            tasks.start_soon(self._batcher.serve)
            while True:
                await trio.sleep(self._idle_seconds / _LOOKS)
                self._sessions.expire()

    def release(self) -> None:
        """Zero what is left of all sessions."""
        self._batcher.core.release()

    def _open_grant(self, request: InferRequest) -> Grant:
        sealed, session = request.encrypted_session_key, self._sessions.find(request.session_id)
        if session is not None and sealed == session.sealed_grant and self._keys.has(sealed):
            return session.grant
        try:
            return self._keys.open(sealed, grant_info(self._core_hash, request.session_id))
        except WrongKey:
            key, nonce = self._keys.public_key(), wrong_key_nonce(request)
            shown = show_key(key, self._core_hash, nonce, self._attester)
            detail = "encrypted_session_key is sealed to another worker's key, or an old one"
            raise DoorError(DoorFault.WRONG_KEY, detail, shown) from None

    async def _session(self, question: Question, grant: Grant) -> Session:
        """The session that a request goes on with, or begins."""
        session_id = question.frame.session_id
        session = self._sessions.find(session_id)
        if session is not None and session.is_under(grant):
            _check_turn(session, question)
            return session
        if session is not None and not compare_digest(session.grant.owner, grant.owner):
            raise DoorError(DoorFault.CONFLICT, "the session is another client's")
        if session is not None and grant.session_key in session.succeeded:
            # Attack, or a client that has lost the session to a second one of its owner's: whoever
            # began last has it, or each would take it from the other without end.
            raise DoorError(DoorFault.CONFLICT, "the session has been begun anew elsewhere")
        if not question.is_first:
            raise _unknown()
        return await self._begin(question, grant, session)

    async def _begin(self, question: Question, grant: Grant, before: Session | None) -> Session:
        """A session from its first step on, in the slot of the one before it if there is one."""
        session_id, position = question.frame.session_id, question.place.position
        bodies = Bodies(grant.session_key, self._core_hash)
        # A body that is not its own begins nothing.
        _, mark = question.tensors(_open(bodies, question))
        if position and (not mark or self._store is None):
            raise _unknown()
        if before is None:
            session = self._sessions.begin(session_id, grant, bodies, self._new_kept(grant))
            logger.debug("event=door_session_started sessions=%d", len(self._sessions))
        else:
            session = before
            self._cache.truncate(session.slot, 0)
            session.succeed(grant, bodies)
        if position:
            try:
                await self._restore(session, position, mark)
            except BaseException:
                self._sessions.end(session_id)
                raise
        return session

    async def _restore(self, session: Session, position: int, mark: bytes) -> None:
        """Have a slot hold what a store has of its session. Raises DoorError."""
        assert session.kept is not None, "there is a store"
        try:
            kept = parse_mark(mark)
            if kept is None or kept.mark.position < position:
                raise DoorError(DoorFault.INVALID, "the step is behind what its mark is of")
            await session.kept.load(kept, partial(self._cache.restore, session.slot))
        except MessageError as error:
            raise DoorError(DoorFault.INVALID, str(error)) from error
        except (StoreError, StateRefused) as error:
            logger.warning("event=door_session_not_restored error=%s", error)
            raise _unknown() from error

    def _new_kept(self, grant: Grant) -> KeptState | None:
        return None if self._store is None else KeptState(self._store, grant.owner, self._place)

    async def _run(self, session: Session, question: Question) -> None:
        tensors, _ = question.tensors(_open(session.bodies, question))
        (_, position, num_rows), num_tokens = question.place, question.num_tokens
        held = self._cache.lengths[session.slot]
        if position > held:
            detail = f"a step at position {position}, the session holds {held} tokens"
            raise DoorError(DoorFault.INVALID, detail)
        try:
            rows = self._limits.codec.decode(tensors) if num_tokens else None
        except MessageError as error:
            raise DoorError(DoorFault.INVALID, str(error)) from error
        self._cache.truncate(session.slot, position)
        if session.kept is not None:
            session.kept.cut(position)
        done = partial(_done, session, question)
        if rows is None:
            done(self._batcher.no_rows)
        else:
            segment = Segment(session.slot, position, num_tokens)
            await self._batcher.run(Work(segment, rows, num_rows, done))

    async def _answer(self, session: Session, question: Question) -> InferResponse:
        """The answer to the last step, sealed once."""
        last = session.last
        assert last is not None, "a step has been run"
        if isinstance(last, Answered):
            return last.answer
        mark = b""
        if session.kept is not None and not question.is_last:
            slot = session.slot
            await session.kept.save(self._cache.lengths[slot], partial(self._cache.export, slot))
            mark = session.kept.mark
        frame = Frame(question.frame.session_id, ANSWER_DTYPE, last.rows.shape)
        sealed = session.bodies.seal_answer(
            frame, last.digest, last.num_tokens, last.rows.tobytes() + mark
        )
        nonce = sealed[:NONCE_BYTES]
        answer = InferResponse(sealed, frame.shape, ANSWER_DTYPE, last.num_tokens, nonce=nonce)
        session.last = Answered(last.digest, answer)
        return answer


def _done(session: Session, question: Question, rows: Floats) -> None:
    """Count a step as run: from now on only its own request gets an answer for it."""
    session.next_step += 1
    session.last = Computed(question.digest, question.num_tokens, rows)


def _check_turn(session: Session, question: Question) -> None:
    """Refuse all but the next step, and the last one's own request. Raises DoorError."""
    step, due = question.place.step, session.next_step
    if step == due:
        return
    if step > due:
        # Steps that this door has not seen were another's, or were lost with its memory.
        raise _unknown()
    last = session.last
    # Attack: an older request sent again, to run twice or to learn how another answer looks.
    if step < due - 1 or last is None or last.digest != question.digest:
        raise DoorError(DoorFault.CONFLICT, f"step {step} has been run, step {due} is next")


def _open(bodies: Bodies, question: Question) -> bytes:
    try:
        return bodies.open_request(question.frame, question.place, question.sealed)
    except MessageError as error:
        raise DoorError(DoorFault.UNAUTHENTIC, "cloaked_embedding does not open") from error


def _unknown() -> DoorError:
    return DoorError(DoorFault.UNKNOWN_SESSION, "no such session here; begin it anew")
