"""Who waits and who runs: who comes next, who has to give way, and who is given up. Pure."""

from collections import deque
from collections.abc import Callable, Sequence

from pipeline.engine.admission import Admission
from pipeline.engine.fair_shares import WaitingLine, first_to_give_way, owes_a_slot
from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.engine.request import Request, RequestState
from pipeline.engine.step import Notice, Step
from pipeline.engine.suspects import Suspects
from pipeline.errors import PromptError
from pipeline.protocol.messages import Abort, Start

LOST = "stages were lost whenever this request was computed"


class Roster:
    """Admits requests to KV slots in order of arrival, as long as what they hold fits together."""

    def __init__(
        self,
        limits: Limits,
        on_give_up: Callable[[int, str], None] | None,
        prefixes: PrefixOptions,
        clock: Callable[[], float],
        in_flight: deque[Step],
    ) -> None:
        """`in_flight`: the steps under way, which whoever sends them keeps."""
        self.num_given_up = 0
        # How often a request has given way to those that had come before it.
        self.num_given_way = 0
        self.waiting = WaitingLine()
        self.running: dict[int, RequestState] = {}
        self.admission = Admission(limits, prefixes, clock)
        self.pool = self.admission.pool
        self.suspects = Suspects()
        self.notices: list[Notice] = []
        self._num_slots = limits.num_slots
        self._on_give_up = on_give_up
        self._num_arrived = 0
        self._in_flight = in_flight

    @property
    def by_slot(self) -> dict[int, RequestState]:
        """Those that run."""
        return {state.slot: state for state in self.running.values()}

    @property
    def has_room(self) -> bool:
        """Whether one token more fits."""
        return self.pool.num_tokens is None or self.num_held < self.pool.num_tokens

    @property
    def num_held(self) -> int:
        """Rows that stages hold once all that is known has been sent."""
        running, admission = self.running.values(), self.admission
        return self.pool.held(running) + admission.num_transferred(running) + admission.num_idle

    def num_shared(self, salt: bytes | None, prompt_ids: Sequence[int]) -> int:
        """How many tokens of a prompt would not have to be computed for whoever has this salt."""
        others = (*self.running.values(), *self.waiting)
        return self.admission.num_held(salt, prompt_ids, others)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PromptError when it can never be served."""
        length, room = len(request.prompt_ids), self.pool.max_tokens
        if length == 0:
            raise PromptError("the prompt is empty; give at least one token of text")
        if length >= room:
            raise PromptError(
                f"the prompt has {length} tokens and the context holds {room}; "
                f"shorten it to at most {room - 1}"
            )
        self.waiting.add(RequestState(request, self._num_arrived))
        self._num_arrived += 1

    def admit(self) -> None:
        """Give slots to those that may have one now."""
        while self.waiting:
            state = self.waiting.first(self.running.values())
            request_id = state.request.request_id
            if state.num_known > self.pool.max_tokens:
                has, most = state.num_known, self.pool.max_tokens
                reason = f"the text has {has} tokens and the stages have KV memory for {most}"
                self._give_up(request_id, reason)
                continue
            if not self.admission.has_room or not self._may_come(state):
                self._see_to_shares(state)
                break
            self.waiting.remove(request_id)
            self.admission.admit(state, self.running.values())
            self.running[request_id] = state
            self.notices.append(Start(request_id=request_id, slot=state.slot))
        self.admission.follow(self.running.values())

    def make_room(self) -> bool:
        """Have all fit that is known; whether it does.

        What idles goes first, then what is just being saved is waited for, then the request that
        came last gives way: the first one always goes on.
        """
        if self.pool.num_tokens is None:
            return True
        while (num_over := self.num_held - self.pool.num_tokens) > 0:
            if self.admission.shrink(self.admission.num_idle - num_over):
                continue
            running = self.running.values()
            if self.admission.num_transferred(running):
                return False
            state = first_to_give_way(running)
            assert state is not None, "what is being loaded does not grow"
            self.admission.slots.end(self._give_way(state))
        return True

    def fit(self, by_slot: dict[int, RequestState]) -> None:
        """Have those give way whose replay a stage that has been replaced has no room for."""
        while sum(self.pool.rows(each.num_sent) for each in by_slot.values()) > self.pool.size:
            state = first_to_give_way(by_slot.values())
            assert state is not None, "nothing is being loaded any more"
            del by_slot[self._give_way(state)]

    def lose(self, request_id: int) -> bool:
        """Count the loss of a request's step; forget the request if that has been too many."""
        if not self.suspects.lose(request_id) or self._on_give_up is None:
            return False
        self._give_up(request_id, LOST)
        self.notices.append(Abort(request_id=request_id))
        return True

    def _may_come(self, state: RequestState) -> bool:
        """Whether there is room for the one that waits, and no result of it is still to come."""
        request_id, running = state.request.request_id, self.running.values()
        if any(request_id in step.owners for step in self._in_flight):
            return False
        num_other = self.admission.num_transferred(running)
        is_alone = not running and not num_other
        return is_alone or self.pool.fits(state, running, num_other)

    def _see_to_shares(self, state: RequestState) -> None:
        """Have another client's request give way to one that waits, where that is only fair."""
        slots = self.admission.slots
        is_clearing = slots.is_dirty or any(step.freed for step in self._in_flight)
        debtor = owes_a_slot(state, self.running.values(), self._num_slots)
        if debtor is not None and not is_clearing:
            slots.end(self._give_way(debtor))

    def _give_way(self, state: RequestState) -> int:
        """Have a request wait again, before all others; its slot."""
        request_id, slot = state.request.request_id, state.slot
        del self.running[request_id]
        self.admission.unfollow(state)
        state.give_way(is_row_exact=self.admission.is_row_exact)
        self.waiting.add(state, is_first=True)
        self.notices.append(Abort(request_id=request_id))
        self.num_given_way += 1
        return slot

    def _give_up(self, request_id: int, why: str) -> None:
        self.num_given_up += 1
        self.waiting.remove(request_id)
        self.running.pop(request_id, None)
        self.suspects.clear((request_id,))
        if self._on_give_up is not None:
            self._on_give_up(request_id, why)
