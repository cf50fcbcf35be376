"""Who has a slot: sessions by their names, one request of each at a time, idle ones forgotten."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hmac import compare_digest

import trio

from pipeline.doors.bodies import Bodies
from pipeline.doors.grants import Grant
from pipeline.doors.kept_state import KeptState
from pipeline.doors.messages import DoorError, DoorFault, InferResponse
from pipeline.dtypes import Floats

# Keys of clients that another has succeeded, told apart from keys never heard of.
MAX_SUCCEEDED = 16


@dataclass(frozen=True, slots=True)
class Computed:
    """A step has been run: its request's digest, its tokens, and the rows that go back."""

    digest: bytes
    num_tokens: int
    rows: Floats


@dataclass(frozen=True, slots=True)
class Answered:
    """A step's answer as it was sealed, for that same request."""

    digest: bytes
    answer: InferResponse


@dataclass(slots=True)
class Session:
    """One client's session under one key. `next_step` alone may change what its slot holds."""

    grant: Grant
    bodies: Bodies
    slot: int
    kept: KeptState | None = None
    next_step: int = 0
    last: Computed | Answered | None = None
    # As it was opened last: the same bytes need not be opened for every token.
    sealed_grant: bytes = b""
    succeeded: deque[bytes] = field(default_factory=lambda: deque(maxlen=MAX_SUCCEEDED))
    used: float = 0.0

    def is_under(self, grant: Grant) -> bool:
        """Whether a grant holds this session's key."""
        return compare_digest(self.grant.session_key, grant.session_key)

    def succeed(self, grant: Grant, bodies: Bodies) -> None:
        """Begin anew, in the same slot, under another key of the same owner."""
        self.succeeded.append(self.grant.session_key)
        self.grant, self.bodies = grant, bodies
        self.next_step, self.last = 0, None
        if self.kept is not None:
            self.kept.cut(0)


class SessionTable:
    """Sessions that own a slot, as many as there are slots."""

    def __init__(
        self,
        num_slots: int,
        idle_seconds: float,
        clock: Callable[[], float],
        clear: Callable[[int], None],
    ) -> None:
        """`clear` zeroes a slot, which is done before anybody else gets it."""
        self._free = list(reversed(range(num_slots)))
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._clear = clear
        self._sessions: dict[str, Session] = {}
        self._turns: dict[str, trio.Lock] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @asynccontextmanager
    async def turn(self, session_id: str) -> AsyncIterator[None]:
        """Requests of one session come one after the other, in the order of their arrival."""
        lock = self._turns.setdefault(session_id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._turns.pop(session_id, None)

    def find(self, session_id: str) -> Session | None:
        """A session that is here."""
        return self._sessions.get(session_id)

    def touch(self, session: Session, sealed_grant: bytes) -> None:
        """It has been used: what is not authentic does not keep one from being forgotten."""
        session.used = self._clock()
        session.sealed_grant = sealed_grant

    def begin(
        self, session_id: str, grant: Grant, bodies: Bodies, kept: KeptState | None
    ) -> Session:
        """Give a new session a slot. Raises DoorError where none is free."""
        if not self._free:
            self.expire()
        if not self._free:
            raise DoorError(DoorFault.BUSY, f"all {len(self._sessions)} sessions are taken")
        session = Session(grant, bodies, self._free.pop(), kept, used=self._clock())
        self._sessions[session_id] = session
        return session

    def end(self, session_id: str) -> None:
        """Forget a session: nothing of it is left."""
        session = self._sessions.pop(session_id)
        self._clear(session.slot)
        self._free.append(session.slot)

    def expire(self) -> None:
        """Forget sessions that nobody has used for so long."""
        for session_id in list(self._idle()):
            self.end(session_id)

    def _idle(self) -> Iterator[str]:
        now = self._clock()
        for session_id, session in self._sessions.items():
            if session_id not in self._turns and not 0 <= now - session.used < self._idle_seconds:
                yield session_id
