"""Several engines as one: a request goes where most of its text is held, and least is to be done.

Each engine has stages of its own, all of the same manifest. What somebody's session or prompt goes
on from lies on the stages that have computed it, so that comes first; but not at any price: what
everybody's prompt begins with would else keep all requests in one place.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from pipeline.engine.admission import MIN_COPY
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.token_stream import TokenStream

# Sessions whose last place is remembered; each is a few bytes.
MAX_SESSIONS = 4096
# Of an engine's slots: so many more requests than another it may have for what it holds of them.
SLACK = 4


class Member(Protocol):
    """One of them."""

    @property
    def engine(self) -> PipelineEngine:
        """What generates."""
        ...

    @property
    def takes_requests(self) -> bool:
        """Whether its stages stand, and it is to be given more."""
        ...


class Replicas:
    """An `Engine` for whoever serves requests. Must be used under trio."""

    def __init__(self, members: Sequence[Member]) -> None:
        """At least one, all of which have room for as much."""
        self._members = members
        self._num_slots = members[0].engine.scheduler.limits.num_slots
        # Requests that each has now.
        self._num_open = [0] * len(members)
        self._has_ended = trio.lowlevel.ParkingLot()
        self._sessions: OrderedDict[bytes, int] = OrderedDict()

    @property
    def max_seq_len(self) -> int:
        """Tokens a request may occupy, whoever gets it."""
        return min(member.engine.max_seq_len for member in self._members)

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncIterator[TokenStream]:
        """As the chosen engine's."""
        idx = self.choose(generation)
        self._num_open[idx] += 1
        try:
            async with self._members[idx].engine.generate(generation) as stream:
                yield stream
        finally:
            self._num_open[idx] -= 1
            self._has_ended.unpark_all()

    def choose(self, generation: Generation) -> int:
        """Who is to generate; of those that take no requests where none does, which then wait."""
        able = [idx for idx, each in enumerate(self._members) if each.takes_requests]
        able = able or list(range(len(self._members)))
        if generation.stored is None:
            return self._least_work(generation, able)
        session_id = generation.stored.session_id
        idx = self._sessions.pop(session_id, -1)
        if idx not in able:
            idx = self._least_work(generation, able)
        self._sessions[session_id] = idx
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return idx

    def _least_work(self, generation: Generation, able: Sequence[int]) -> int:
        num_open = self._num_open
        least = min(num_open[idx] for idx in able)
        # Nobody waits for a slot while there is one elsewhere.
        most_open = max(least, min(least + self._num_slots // SLACK, self._num_slots - 1))
        able = [idx for idx in able if num_open[idx] <= most_open]
        held = {idx: self._num_shared(idx, generation) for idx in able}
        enough = max(held.values()) - MIN_COPY
        return min((idx for idx in able if held[idx] > enough), key=num_open.__getitem__)

    def _num_shared(self, idx: int, generation: Generation) -> int:
        roster = self._members[idx].engine.scheduler.roster
        return roster.num_shared(generation.salt, generation.prompt_ids)

    async def wait_idle(self, idx: int) -> None:
        """Return when one has no request, and has saved what those have left."""
        while self._num_open[idx]:
            await self._has_ended.park()
        await self._members[idx].engine.wait_saved()
