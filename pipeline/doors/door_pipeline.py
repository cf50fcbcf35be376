"""A pipeline whose only stage is behind a door: the engine's steps become requests to it."""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import trio

from pipeline.codecs.base import ActivationCodec
from pipeline.doors.bodies import MAX_MARK_BYTES, TAG_BYTES
from pipeline.doors.door_evidence import TrustedKey
from pipeline.doors.door_session import DoorPolicy, DoorSession, SessionName
from pipeline.doors.home_record import Remembered
from pipeline.doors.messages import Door, DoorError, DoorFault, InferRequest
from pipeline.dtypes import Floats
from pipeline.engine.step import FollowUp, Notice, Step
from pipeline.engine.step_runner import RunnerStats
from pipeline.errors import InputError, SessionError, StoreError
from pipeline.orchestrator.client_ends import ClientEnds
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import CLEAR_SENTINEL
from pipeline.protocol.step_results import StepResult, result_to_wire
from pipeline.protocol.stored_state import Mark
from transport.tensor_frames import Tensor

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.05
LAST_PAUSE_SECONDS = 2.0
# Where every answer is another worker's that has heard of nothing, or of another key, none will do.
MAX_REBUILDS = 5
MAX_WRONG_KEYS = 5
OWN_STORE = "a door keeps its sessions by itself"
# What asking again does not change. All else may be over soon, and so may be what keeps a door from
# being reached.
_FINAL = frozenset(
    {
        DoorFault.INVALID,
        DoorFault.UNAUTHENTIC,
        DoorFault.WRONG_KEY,
        DoorFault.CONFLICT,
        DoorFault.UNKNOWN_SESSION,
        DoorFault.TOO_LARGE,
    }
)


@dataclass(frozen=True, slots=True)
class DoorOptions:
    """What the user may choose: the session's name, and how long a door may be away or busy."""

    name: SessionName
    policy: DoorPolicy
    patience_seconds: float
    # Bytes that the sealed rows of a request may have: what its transport takes.
    max_body_bytes: int
    # Of an earlier run.
    remembered: Remembered | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens that the door holds, as they were sent: a sum may round otherwise in other steps."""

    position: int
    token_ids: tuple[int, ...]
    request: int

    @property
    def end(self) -> int:
        """The position behind it."""
        return self.position + len(self.token_ids)

    def behind(self, start: int) -> "_Piece | None":
        """What of it is not before a position."""
        skipped = max(0, start - self.position)
        if skipped >= len(self.token_ids):
            return None
        return _Piece(self.position + skipped, self.token_ids[skipped:], self.request)

    def step(self) -> Step:
        """What sends them once more."""
        segment = Segment(0, self.position, len(self.token_ids))
        header = StepHeader(StepKind.REPLAY, 0, (segment,), (Want.NOTHING,))
        return Step(header, self.token_ids, (), requests=(self.request,))


class _Forgotten(Exception):
    """The door knows nothing of the session."""


class _Patience:
    """How long a door may be busy or away, in ever longer pauses."""

    def __init__(self, seconds: float) -> None:
        self._deadline = trio.current_time() + seconds
        self._pause = FIRST_PAUSE_SECONDS

    async def after(self, error: DoorError | SessionError) -> None:
        """Wait a moment. Raises SessionError for what does not pass, or has not."""
        is_final = isinstance(error, DoorError) and error.fault in _FINAL
        if is_final or trio.current_time() + self._pause > self._deadline:
            if isinstance(error, SessionError):
                raise error
            raise SessionError(f"the door refuses: {error}") from error
        level = logging.INFO if self._pause == FIRST_PAUSE_SECONDS else logging.DEBUG
        logger.log(level, "event=door_waiting error=%s", error)
        await trio.sleep(self._pause)
        self._pause = min(2 * self._pause, LAST_PAUSE_SECONDS)


class DoorPipeline:
    """Runs steps of one slot behind a door, and rebuilds from tokens what the door has lost."""

    def __init__(
        self, door: Door, options: DoorOptions, ends: ClientEnds, codec: ActivationCodec
    ) -> None:
        """Raises InputError where a request has no room for a token."""
        self._door, self._options, self._ends, self._codec = door, options, ends, codec
        token_bytes = sum(spec.nbytes for spec in codec.specs(1))
        room = options.max_body_bytes - TAG_BYTES - MAX_MARK_BYTES
        self._tokens_per_body = room // token_bytes
        if self._tokens_per_body < 1:
            raise InputError(
                f"a request of {options.max_body_bytes} bytes has no room for a token's "
                f"{token_bytes}"
            )
        self._no_rows = np.empty((0, codec.hidden_dim), np.float32)
        self._session: DoorSession | None = None
        # What the door holds, or has stored.
        self._held: list[_Piece] = []
        if options.remembered is not None:
            self._held.append(_Piece(0, options.remembered.token_ids, 0))
        self._results: deque[StepResult] = deque()
        self._num_keys = self._num_rebuilds = 0
        self._recovery_seconds = 0.0

    @property
    def stats(self) -> RunnerStats:
        """Keys verified, and how often the session was rebuilt."""
        return RunnerStats(self._num_keys, self._num_rebuilds, self._recovery_seconds)

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._ends.vocab_size

    @property
    def is_row_exact(self) -> bool:
        """Unknown of what is behind a door."""
        return False

    async def save(self, *_: object) -> Sequence[Sequence[Mark]]:
        """A door keeps sessions by itself. Raises StoreError."""
        raise StoreError(OWN_STORE)

    async def load(self, *_: object) -> None:
        """A door keeps sessions by itself. Raises StoreError."""
        raise StoreError(OWN_STORE)

    async def notify(self, notices: Sequence[Notice]) -> None:
        """A door hears of nothing but steps."""

    def prepare(self, follow_up: FollowUp | None) -> None:
        """Nothing waits for what follows: the next token is made here."""

    async def receive(self) -> StepResult:
        """The oldest result."""
        return self._results.popleft()

    async def send(self, step: Step) -> None:
        """Run a step of one segment to its end. Raises SessionError, InputError."""
        header, tensors = self._ends.begin(step)
        (segment,), (want,) = header.segments, header.wants
        if header.kind is StepKind.TRUNCATE:
            # The next step's position tells the door, and until then it may as well hold all.
            self._results.append(self._ends.end(step, header, (CLEAR_SENTINEL,)))
            return
        num_known = min(self._num_known(segment, step.token_ids), segment.num_tokens - want.rows)
        rows = self._no_rows
        if num_known < segment.num_tokens:
            start = segment.position + num_known
            self._cut(start)
            rows = await self._run_or_rebuild(segment, tensors, num_known, want.rows)
            self._held.append(_Piece(start, step.token_ids[num_known:], step.requests[0]))
        nothing = np.empty(0, np.float32)
        results = result_to_wire(
            [],
            logits=nothing,
            hidden=rows,
            logprobs=nothing,
            top_ids=nothing.astype(np.uint32),
        )
        self._results.append(self._ends.end(step, header, results))

    @property
    def remembered(self) -> Remembered | None:
        """What a later run may go on from: what is stored of the tokens so far."""
        if self._session is None:
            return self._options.remembered
        mark = self._session.mark
        if mark is None:
            return None
        token_ids = [token_id for piece in self._held for token_id in piece.token_ids]
        return Remembered(tuple(token_ids[: mark.mark.position]), mark)

    async def end(self) -> None:
        """Have the door forget the session at once: nobody will come back to it."""
        if self._session is not None:
            try:
                await self._door.infer(self._session.seal(0, (), 0))
            except (DoorError, SessionError) as error:
                logger.debug("event=door_session_not_ended error=%s", error)

    def _num_known(self, segment: Segment, token_ids: Sequence[int]) -> int:
        """How many tokens of a step, from its first on, the door has at their very places."""
        if not self._held or segment.position >= self._held[-1].end:  # as with most
            return 0
        held = [token_id for piece in self._held for token_id in piece.token_ids]
        pairs = zip(held[segment.position :], token_ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    async def _run_or_rebuild(
        self, segment: Segment, tensors: Sequence[Tensor], num_known: int, num_rows: int
    ) -> Floats:
        """A step's rows, those aside that are known, whatever the door has forgotten."""
        if self._session is None:
            self._session = await self._open_session()
        session, lost_at = self._session, math.inf
        for _ in range(MAX_REBUILDS + 1):
            try:
                if lost_at < math.inf:
                    await self._rebuild(session, segment.position + num_known)
                rows = await self._run(session, segment, tensors, num_known, num_rows)
            except _Forgotten:
                logger.warning("event=door_session_lost position=%d", segment.position)
                lost_at = min(lost_at, trio.current_time())
            else:
                if lost_at < math.inf:
                    self._recovery_seconds = trio.current_time() - lost_at
                return rows
        raise SessionError("the door forgets the session whenever it is rebuilt")

    async def _rebuild(self, session: DoorSession, position: int) -> None:
        """Go on from what is stored, if anything is; send all else that is held once more."""
        self._num_rebuilds += 1
        start = min(session.num_stored, position)
        session.restart(session.mark if start else None)
        await self._send_again(session, start)

    async def _send_again(self, session: DoorSession, start: int) -> None:
        for piece in self._held:
            if (rest := piece.behind(start)) is not None:
                header, tensors = self._ends.begin(rest.step())
                await self._run(session, header.segments[0], tensors, 0, 0)

    async def _run(
        self,
        session: DoorSession,
        segment: Segment,
        tensors: Sequence[Tensor],
        num_known: int,
        num_rows: int,
    ) -> Floats:
        """A step's rows, in as many requests as it takes; its first `num_known` are left out."""
        found = [self._no_rows]
        num_tokens = segment.num_tokens
        for part in self._parts(num_known, num_tokens):
            own = [
                Tensor(spec, _rows(tensor, num_tokens, part))
                for spec, tensor in zip(self._codec.specs(len(part)), tensors, strict=True)
            ]
            num_wanted = max(0, part.stop - max(part.start, num_tokens - num_rows))
            request = session.seal(segment.position + part.start, own, num_wanted)
            found.append(await self._ask(session, request))
        return np.concatenate(found)

    def _parts(self, start: int, stop: int) -> Iterator[range]:
        for at in range(start, stop, self._tokens_per_body):
            yield range(at, min(at + self._tokens_per_body, stop))

    async def _ask(self, session: DoorSession, request: InferRequest) -> Floats:
        """The answer to a step, which is sent until it is answered."""
        patience, num_wrong = _Patience(self._options.patience_seconds), 0
        while True:
            try:
                answer = await self._door.infer(request)
            except SessionError as error:
                await patience.after(error)
            except DoorError as error:
                if error.fault is DoorFault.UNKNOWN_SESSION:
                    session.forgotten()
                    raise _Forgotten from error
                if error.fault is DoorFault.WRONG_KEY and num_wrong < MAX_WRONG_KEYS:
                    num_wrong += 1
                    request = session.reseal(await self._other_key(request, error))
                else:
                    await patience.after(error)
            else:
                return session.open(answer)

    async def _open_session(self) -> DoorSession:
        """A session with a door that has shown what it is."""
        key = await self._attested_key()
        remembered = self._options.remembered
        mark = None if remembered is None else remembered.mark
        return DoorSession(self._options.name, self._options.policy, self._codec, key, mark)

    async def _other_key(self, request: InferRequest, error: DoorError) -> TrustedKey:
        """What the worker that has answered can open, if it is the right core's too."""
        if error.key is None:
            return await self._attested_key()
        self._num_keys += 1
        return self._options.policy.corrected(request, error.key)

    async def _attested_key(self) -> TrustedKey:
        patience, policy = _Patience(self._options.patience_seconds), self._options.policy
        question = policy.ask()
        while True:
            try:
                answer = await self._door.attest(question)
            except (DoorError, SessionError) as error:
                await patience.after(error)
            else:
                self._num_keys += 1
                return policy.answered(question, answer)

    def _cut(self, length: int) -> None:
        """Forget tokens that the door is to forget."""
        while self._held and self._held[-1].position >= length:
            self._held.pop()
        if self._held:
            last = self._held[-1]
            kept = last.token_ids[: length - last.position]
            self._held[-1] = _Piece(last.position, kept, last.request)


def _rows(tensor: Tensor, num_tokens: int, part: range) -> memoryview:
    """Some tokens' part of a tensor, whose first dimension they are."""
    size = tensor.spec.nbytes // num_tokens
    return tensor.data[part.start * size : part.stop * size]
