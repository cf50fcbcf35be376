"""Which slot a request gets, how much of its prompt that holds already, and what it leaves behind.

A request that ends leaves its keys and values in its slot, which idles until it is needed. One that
begins with the same tokens goes on from there: in the very slot where that is idle, in a copy
where it is another's. The last token of a prompt is always computed, for its row's results.

Reuse changes nothing but time: rows are those of a cold run, bit for bit. So it is there only where
a row's bits depend on nothing but the text before it (`is_row_exact` of all stages). With other
kernels rows round otherwise in steps of other sizes, and nothing is kept or copied. Nor is anything
where rows are noisy: noise belongs to one request's rows.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.engine.idle_prefixes import IdlePrefix, IdlePrefixes, PrefixOptions, common_length
from pipeline.engine.limits import Limits
from pipeline.engine.request import RequestState, has_all_steps
from pipeline.engine.slots import Slots
from pipeline.engine.step import Step
from pipeline.engine.token_pool import TokenPool
from pipeline.protocol.batch import Segment
from pipeline.protocol.replay_history import SlotPart
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind

# To copy less takes longer than to compute it: it is a step of its own.
MIN_COPY = 16


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """A slot's first `length` tokens on their way from a session's store, or to it."""

    state: RequestState
    length: int
    is_load: bool = False
    # Of a request that has left: whether the slot may come to hold a token more.
    has_more: bool = False


class Admission:
    """Owns the slots, and what lies idle in them."""

    def __init__(
        self,
        limits: Limits,
        options: PrefixOptions,
        clock: Callable[[], float],
    ) -> None:
        self.slots = Slots(limits.num_slots)
        self.pool = TokenPool(limits)
        self.num_hits = 0
        self.num_cached_tokens = 0
        self._window = limits.window
        self._share = options.share
        self._num_positions = limits.num_slots * self.pool.rows(limits.max_seq_len)
        max_tokens = int(self._share * self._num_positions)
        self.idle = IdlePrefixes(max_tokens, options.ttl_seconds, clock)
        self.is_row_exact = False
        # Those whose prompt begins as one that is being read.
        self._followers: list[RequestState] = []
        # What is to be loaded from sessions and saved to them, and which of it is under way.
        self._due: list[Transfer] = []
        self._under_way: list[Transfer] = []

    @property
    def has_transfers(self) -> bool:
        """Whether anything is being loaded or saved, or is to be."""
        return bool(self._due or self._under_way)

    @property
    def has_room(self) -> bool:
        """Whether one more request can be admitted."""
        return self.slots.has_free or len(self.idle) > 0

    def allow_reuse(self, is_row_exact: bool) -> None:
        """Keep and reuse, or do not: whether rows are exact, the stages have to tell."""
        self.is_row_exact = is_row_exact
        if not is_row_exact:
            self._end(self.idle.clear())

    def use_pool(self, num_tokens: int | None) -> None:
        """Hold no more than stages have told that they have room for."""
        self.pool.num_tokens = num_tokens
        self.idle.max_tokens = int(self._share * min(self._num_positions, self.pool.size))

    def num_transferred(self, running: Collection[RequestState]) -> int:
        """Rows of slots that are let go of as soon as they are saved, or loaded for nobody."""
        if not self.has_transfers:
            return 0
        return sum(
            self.pool.rows(each.length if each.is_load else each.state.num_sent + each.has_more)
            for each in (*self._due, *self._under_way)
            if each.state not in running
        )

    def num_held(
        self, salt: bytes | None, wanted: Sequence[int], others: Collection[RequestState]
    ) -> int:
        """How many of a prompt's tokens a slot holds, or will once those of `others` are read."""
        if salt is None or not (self.is_row_exact and self.idle.max_tokens):
            return 0
        return max(self.idle.longest(salt, wanted)[1], _leader(salt, wanted, others)[1])

    @property
    def num_idle(self) -> int:
        """Rows of what nobody owns."""
        return sum(map(self.pool.rows, self.idle.lengths)) if self.idle else 0

    def shrink(self, num_rows: float, but: int | None = None) -> bool:
        """Let idle prefixes go until they hold `num_rows` at most; whether they then do."""
        while self.num_idle > num_rows:
            if len(self.idle) - (but is not None) <= 0:
                return False
            self.slots.end(self.idle.evict(but))
        return True

    def expire(self) -> None:
        """Have those prefixes cleared whose time has come."""
        self._end(self.idle.expire())

    def admit(self, state: RequestState, running: Collection[RequestState]) -> None:
        """Give a request its slot; there has to be room. `running`: those that own one."""
        idle, length, leader, num_led = None, 0, None, 0
        # Of what is read nothing can be had but by computing it.
        wanted = () if state.request.num_read else state.known(0, state.num_known - 1)
        salt, others = self._salt(state), (*running, state)
        idle_room = self.pool.size - self.pool.held(others) - self.num_transferred(others)
        if salt is not None:
            idle, length = self.idle.longest(salt, wanted)
            leaders = [each for each in running if self._stays_whole(each)]
            leader, num_led = _leader(salt, wanted, leaders)
        num_stored = self._num_stored(state, wanted)
        if num_stored >= max(length, num_led) + MIN_COPY:
            state.slot = self._empty_slot()
            state.num_loading = num_stored
            self._due.append(Transfer(state, num_stored, is_load=True))
            self.shrink(idle_room)
        elif idle is not None and length >= num_led and self._may_go_on(idle, length, idle_room):
            self.idle.take(idle.slot)
            if length < len(idle.token_ids):
                self.slots.take_back(idle.slot, length)
            state.slot = idle.slot
            self._reuse(state, idle.pieces, length)
            self.shrink(idle_room)
        elif idle is not None and length >= max(num_led, MIN_COPY) and self._is_whole(idle):
            state.slot = self._empty_slot(but=idle.slot)
            whole = has_all_steps(idle.pieces)
            has_room = self.shrink(idle_room, but=idle.slot)
            assert has_room, "else it goes on in that slot"
            self.slots.copy(idle.slot, state.slot, length, is_replayable=whole)
        else:
            state.slot = self._empty_slot()
            self.shrink(idle_room)
            if num_led >= MIN_COPY:
                state.leader, state.num_led = leader, num_led
                self._followers.append(state)

    def unfollow(self, state: RequestState) -> None:
        """Have nothing copied for a request that gives way."""
        self._followers = [each for each in self._followers if each is not state]

    def follow(self, running: Collection[RequestState]) -> None:
        """Have copied what has been read meanwhile for those that wait for it."""
        for state in self._followers:
            leader = state.leader
            if leader is None or leader not in running:
                state.leader = None
            elif leader.num_sent >= state.num_led:
                whole = leader.is_replayable
                self.slots.copy(leader.slot, state.slot, state.num_led, is_replayable=whole)
                state.leader = None
        self._followers = [state for state in self._followers if state.leader is not None]

    def next_step(self, number: int, by_slot: Mapping[int, RequestState]) -> Step:
        """What stages are to forget, or to copy; there is something. `by_slot`: who runs."""
        orders = self.slots.next_orders()
        kind, segments = StepKind.TRUNCATE, list[Segment]()
        for index, (target, length, source, _, is_replayable) in enumerate(orders):
            if source is None:
                segments.append(Segment(target, length, 0))
                continue
            kind = StepKind.COPY
            segments += (Segment(source, 0, length), Segment(target, 0, length))
            if target in by_slot:  # else its request has left
                part = SlotPart(number, index, 0, length)
                self._reuse(by_slot[target], (part,) if is_replayable else (), length)
        header = StepHeader(kind, number, tuple(segments), (Want.NOTHING,) * len(segments))
        return Step(header, (), (), freed=tuple(each.slot for each in orders if each.frees))

    def leave(self, state: RequestState, *, keeps: bool = True, has_more: bool = False) -> None:
        """A request has left its slot, which idles, or is cleared: always, unless it `keeps`.

        `has_more`: whether the slot may come to hold a token more than its request knows of.
        """
        state.leader = None
        if state.num_loading:  # its slot is not let go of before stages have done with it
            return
        if keeps and state.request.stored is not None and state.num_sent:
            # The text is kept with any kernels, keys and values where a row's bits are its own.
            length = state.num_sent if self.is_row_exact else 0
            self._due.append(Transfer(state, length, has_more=has_more))
            return
        self._give_back(state, keeps=keeps, has_more=has_more)

    def take_transfers(self) -> list[Transfer]:
        """What is to be loaded and saved from now on; each ends with `loaded` or `saved`."""
        due, self._due = self._due, []
        self._under_way += due
        return due

    def loaded(self, transfer: Transfer, *, is_done: bool, has_left: bool) -> None:
        """Stages hold what was to be loaded, or, unless it `is_done`, some of it perhaps."""
        self._under_way.remove(transfer)
        state = transfer.state
        state.num_loading = 0
        if has_left:
            self.slots.end(state.slot)
        elif is_done:
            self._reuse(state, (), transfer.length)
        else:
            self.slots.take_back(state.slot, 0)

    def saved(self, transfer: Transfer) -> None:
        """Stages have saved a slot, or cannot: it is let go of."""
        self._under_way.remove(transfer)
        self._give_back(transfer.state, keeps=True, has_more=transfer.has_more)

    def _give_back(self, state: RequestState, *, keeps: bool, has_more: bool) -> None:
        salt = self._salt(state)
        length = min(state.num_sent, self.idle.max_tokens)
        held = state.num_sent + has_more
        if salt is None or not length or not keeps or not self._goes_back(length, held):
            self.slots.end(state.slot)
            return
        prefix = IdlePrefix(state.slot, salt, state.known(0, length), tuple(state.pieces))
        self._end(self.idle.keep(prefix))
        if has_more or length < state.num_sent:
            self.slots.take_back(state.slot, length)

    def rewind(self, owned: Collection[int]) -> None:
        """Every stage goes back to what is certain of these slots, and to nothing of all others."""
        self.idle.clear()
        self._due.clear()
        self._under_way.clear()
        self.slots.rewind(owned)

    def _reuse(self, state: RequestState, pieces: Collection[SlotPart], length: int) -> None:
        """A request's slot holds its first `length` tokens, which came there in these pieces."""
        state.hold(pieces, length)
        self.num_hits += 1
        self.num_cached_tokens += length

    def _num_stored(self, state: RequestState, wanted: Sequence[int]) -> int:
        stored = state.request.stored
        return common_length(stored.stored_ids, wanted) if stored and self.is_row_exact else 0

    def _may_go_on(self, idle: IdlePrefix, length: int, idle_room: float) -> bool:
        """Whether a slot may be taken back to so many tokens of those that it holds, for good.

        Not where more would be lost than is used, and another slot, and room, can be had for a
        copy.
        """
        # Taken back from one token more, it may have dropped already what that one has no room for.
        if not self._goes_back(length, len(idle.token_ids) + 1):
            return False
        has_slot = self.slots.has_free or len(self.idle) > 1
        has_other = has_slot and self.pool.rows(len(idle.token_ids)) <= idle_room
        return 2 * length >= len(idle.token_ids) or not has_other

    def _goes_back(self, length: int, held: int) -> bool:
        """Whether a slot that holds so many tokens can be taken back to `length` of them."""
        return self._window is None or self._window.keeps(length, held)

    def _is_whole(self, idle: IdlePrefix) -> bool:
        """Whether a slot holds all rows of its tokens: only then it can be copied."""
        return self._window is None or len(idle.token_ids) < self._window.size

    def _stays_whole(self, state: RequestState) -> bool:
        """Whether the slot of a request that runs will hold all rows of its tokens to the end."""
        request = state.request
        most = len(request.prompt_ids) + request.max_tokens
        return self._window is None or most <= self._window.size

    def _empty_slot(self, but: int | None = None) -> int:
        if self.slots.has_free:
            return self.slots.take()
        slot = self.idle.evict(but)
        self.slots.take_back(slot, 0)
        return slot

    def _salt(self, state: RequestState) -> bytes | None:
        """Whose a request's text is; None where nothing of it is to be reused."""
        return state.request.salt if self.is_row_exact and self.idle.max_tokens else None

    def _end(self, slots: Collection[int]) -> None:
        for slot in slots:
            self.slots.end(slot)


def _leader(
    salt: bytes, wanted: Sequence[int], running: Collection[RequestState]
) -> tuple[RequestState | None, int]:
    """Whose prompt begins with most of the wanted tokens, of those of this salt; with how many."""
    found, length = None, 0
    for state in running:
        if state.request.salt == salt:
            common = common_length(state.request.prompt_ids, wanted)
            if common > length:
                found, length = state, common
    return found, length
