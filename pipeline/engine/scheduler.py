"""Which tokens travel in the next step. Pure: no torch, no clock, no I/O."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pipeline.engine.admission import Transfer
from pipeline.engine.fair_shares import shared_rows
from pipeline.engine.idle_prefixes import NO_PREFIXES, PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.engine.prefill_chunks import chunk_size, cut_prompts
from pipeline.engine.prompt_reader import MAX_READ_TOKENS
from pipeline.engine.request import FinishReason, Request, RequestState, TokenEvent
from pipeline.engine.roster import Roster
from pipeline.engine.step import FollowUp, Notice, Promise, Step
from pipeline.engine.step_pace import Pace
from pipeline.errors import MessageError
from pipeline.protocol.batch import Segment
from pipeline.protocol.last_stage_inputs import NOTHING_ASKED, Asked
from pipeline.protocol.messages import Abort, Done
from pipeline.protocol.replay_history import SlotPart, replay_headers
from pipeline.protocol.result_kinds import NO_TOKEN, Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.sampling.draw import Draw

# A request that takes part in a step, with at most so many tokens.
Part = tuple[RequestState, int]
# A step of two requests takes no longer than one of either: nothing is gained by less.
MIN_SHARE = 2


class Scheduler:
    """Admits requests to KV slots in order of arrival and batches their tokens into steps.

    While one step is in a stage, the others want work as well: the requests are spread over as many
    steps as there are stages, so none takes more than its share of those that have come furthest
    behind. A step that comes back smaller than its share is filled up from the others.
    """

    def __init__(
        self,
        limits: Limits,
        on_give_up: Callable[[int, str], None] | None = None,
        prefixes: PrefixOptions = NO_PREFIXES,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`on_give_up` hears of requests that cannot go on, and why.

        Without it those are not given up that broke the stages whenever they were tried. `clock`:
        what idle `prefixes` expire by, and steps are timed by, seconds.
        """
        self.limits = limits
        # Whether stages may hold, since the last `rewind`, what they cannot go back behind.
        self.must_rebuild = False
        self._clock = clock
        self._pace = Pace(limits.max_gap, limits.num_stages)
        self._in_flight: deque[Step] = deque()
        self._next_step = 0
        self._promise = Promise()
        self.roster = Roster(limits, on_give_up, prefixes, clock, self._in_flight)
        self._waiting, self._running = self.roster.waiting, self.roster.running
        self.admission, self.pool = self.roster.admission, self.roster.pool
        self._slots = self.admission.slots

    @property
    def has_work(self) -> bool:
        """Whether any request, or any step under way, is left."""
        waits = self._waiting or self._running or self.admission.has_transfers
        return bool(waits or self._in_flight or self._slots.is_dirty)

    @property
    def num_given_up(self) -> int:
        """Requests that could not go on."""
        return self.roster.num_given_up

    @property
    def has_steps(self) -> bool:
        """Whether a step is under way, and so a result to come."""
        return bool(self._in_flight)

    @property
    def num_running(self) -> int:
        """Requests that own a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def use_pool(self, num_tokens: int | None) -> bool:
        """Hold so many tokens at most, as stages have told; None: as many as slots have positions.

        Whether what has been sent is no more than that: else `rewind` once more.
        """
        self.admission.use_pool(num_tokens)
        running = self._running.values()
        return sum(self.pool.rows(state.num_sent) for state in running) <= self.pool.size

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PromptError when it can never be served."""
        self.roster.submit(request)

    def cancel(self, request_id: int, *, keeps: bool = False) -> None:
        """Give a request up, wherever it is.

        Its slot is cleared by the very next step, unless what it holds is worth to be kept.
        """
        self._waiting.remove(request_id)
        state = self._running.pop(request_id, None)
        if state is not None:
            self.admission.leave(state, keeps=keeps, has_more=self._promise.is_given)
            self.roster.notices.append(Abort(request_id=request_id))
        self.roster.suspects.clear((request_id,))

    def loaded(self, transfer: Transfer, *, is_done: bool) -> None:
        """A load has come to its end: the slot holds the tokens, or none."""
        has_left = transfer.state.request.request_id not in self._running
        self.admission.loaded(transfer, is_done=is_done, has_left=has_left)

    def take_back(self, request_id: int, length: int) -> None:
        """Make the stages forget all but a request's first `length` tokens, by the very next step.

        Of none, where a window has dropped rows of these since. What is known of them stays known,
        and is sent again. Raises ValueError for a request that has sent fewer, or of which a step
        is under way, or promised: its result would be of what is forgotten.
        """
        if (state := self._waiting.get(request_id)) is not None:
            if state.num_known < length:
                raise ValueError(f"request {request_id} knows {state.num_known} tokens")
            return  # it holds none
        state = self._running[request_id]
        is_under_way = self._promise.is_given or any(
            request_id in step.requests for step in self._in_flight
        )
        if not 0 <= length <= state.num_sent or is_under_way:
            raise ValueError(
                f"request {request_id} cannot keep {length} of {state.num_sent} tokens now"
            )
        if not self._keeps(length, state.num_sent):
            length = 0
        if length < state.num_sent:
            state.unsend(state.num_sent - length)
            self._slots.take_back(state.slot, length)

    def rewind(self) -> list[int]:
        """Forget the steps under way; returns the tokens every stage is certain to hold, by slot.

        Those of steps whose result has come back, that is: no other token has been sampled, so
        nothing is sampled twice. The caller clears every other slot on every stage. Where
        `must_rebuild`, stages cannot go back so far, and the caller clears all and replays.
        """
        by_slot = self.roster.by_slot
        # What has been promised may have been computed as well.
        ahead = 1 if self._promise.is_given else 0
        most = {slot: state.num_sent + ahead for slot, state in by_slot.items()}
        # What came before it has come back. A slot may hold what another request has sent there.
        first = self._in_flight[0].header.step if self._in_flight else self._next_step
        lost = [slot for slot, state in by_slot.items() if state.unsend_since(first)]
        for state in by_slot.values():
            state.num_loading = 0
            if not state.is_replayable:  # no stage could be given again what was loaded
                state.unsend(state.num_sent)
        self._in_flight.clear()
        self._pace.forget()
        self._promise.void()
        for slot in lost:
            if self.roster.lose(by_slot[slot].request.request_id):
                del by_slot[slot]
        self.roster.fit(by_slot)
        self.admission.rewind(by_slot)
        self.must_rebuild = not all(
            self._keeps(state.num_sent, most[slot]) for slot, state in by_slot.items()
        )
        slots = range(self.limits.num_slots)
        return [by_slot[slot].num_sent if slot in by_slot else 0 for slot in slots]

    def replay(self, until: int) -> Iterator[Step]:
        """The steps of all certain tokens once more, for stages 0 to `until`. After `rewind`."""
        by_slot = self.roster.by_slot
        pieces = {slot: tuple(state.pieces) for slot, state in by_slot.items()}
        for header in replay_headers(pieces, until, self.limits.max_step_tokens):
            token_ids = tuple(
                token_id
                for each in header.segments
                for token_id in by_slot[each.slot].known(
                    each.position, each.position + each.num_tokens
                )
            )
            requests = tuple(by_slot[each.slot].request.request_id for each in header.segments)
            yield Step(header, token_ids, (), requests=requests)

    def next_step(self) -> Step | None:
        """The next step to send, or None when all that is known is under way, or must wait."""
        if self._promise.open is not None:
            return None  # it may have been sent: nothing goes before it
        step = self._promised_step()
        if step is None:
            has_room = self.roster.make_room()
            self.roster.admit()
            step = self._slot_step() or (self._token_step() if has_room else None)
        if step is not None:
            self._in_flight.append(step)
            self._next_step += 1
            if step.header.kind is StepKind.STEP:
                tokens = step.header.num_tokens
                self._pace.sent(step.header.step, tokens, step.num_read, self._clock())
        return step

    def follow_up(self) -> FollowUp | None:
        """What `next_step` will be once the step under way is complete, where that is certain.

        It is for a lone request, and a promise: whoever comes or leaves meanwhile, that step is the
        next one, unless the token ends the request.
        """
        if self._promise.open is not None:
            return self._promise.open
        if len(self._in_flight) != 1 or len(self._running) != 1 or self._waiting:
            return None
        due = self._in_flight[0]
        ((request_id, state),) = self._running.items()
        request = state.request
        is_due = due.owners == (request_id,) and not self._slots.is_dirty
        num_left = min(
            request.max_tokens - len(state.token_ids), self.pool.max_tokens + 1 - state.num_known
        )
        if not is_due or not request.want.num_tokens or num_left < 2:
            return None
        if not self.roster.has_room:
            return None
        segments = (Segment(state.slot, state.num_sent, 1),)
        header = StepHeader(StepKind.STEP, self._next_step, segments, (request.want,))
        how = None if request.next_draw is None else request.next_draw(1)
        behind = None
        if request.draw_behind is not None:
            behind = partial(request.draw_behind, len(state.token_ids))
        ends = request.eos_token_ids
        return self._promise.give(FollowUp(due.header, header, ends, how, behind))

    def take_notices(self) -> list[Notice]:
        """What stages are to hear of requests' lives before the next step, in this order."""
        notices, self.roster.notices = self.roster.notices, []
        return notices

    def due(self, header: StepHeader) -> Step:
        """The step that a result answers. Raises MessageError if it is not due."""
        if not self._in_flight or self._in_flight[0].header.step != header.step:
            raise MessageError(f"the last stage answered step {header.step}, which is not due")
        due = self._in_flight[0]
        asked = (due.header.kind, due.header.segments, due.header.wants)
        if (header.kind, header.segments, header.wants) != asked:
            raise MessageError(f"the last stage answered something else than step {header.step}")
        return due

    def complete(self, header: StepHeader, token_ids: Sequence[int]) -> list[TokenEvent]:
        """Take a step's result, a token for each owner; those cancelled meanwhile are dropped.

        Raises MessageError unless it answers the oldest step.
        """
        owners = self.due(header).owners
        if len(token_ids) != len(owners):
            raise MessageError(
                f"step {header.step} returned {len(token_ids)} tokens, expected {len(owners)}"
            )
        step = self._in_flight.popleft()
        self._pace.came(
            header.step, [each.compute_ns / 1e9 for each in header.timings], self._clock()
        )
        self._promise.come(token_ids, owners)
        # The requests of a step that came back are not what breaks the stages.
        self.roster.suspects.clear(step.requests)
        self._slots.free(step.freed)
        ended = [(request_id, NO_TOKEN) for request_id in step.ended]
        return [
            self._advance(request_id, token_id, header.step)
            for request_id, token_id in (*zip(owners, token_ids, strict=True), *ended)
            if request_id in self._running or request_id in self._waiting
        ]

    def _promised_step(self) -> Step | None:
        """The follow-up, if it is due. Its request may be gone: then nobody wants its token."""
        step = self._promise.take()
        if step is not None and (state := self._running.get(step.owners[0])) is not None:
            state.sent(SlotPart(step.header.step, 0, state.num_sent, 1))
        return step

    def _slot_step(self) -> Step | None:
        """What stages are to do to slots before any more tokens go."""
        if not self._slots.is_dirty:
            return None
        return self.admission.next_step(self._next_step, self.roster.by_slot)

    def _token_step(self) -> Step | None:
        """A step of the requests that have waited longest, if a stage has nothing to do."""
        num_under_way = sum(step.header.kind is StepKind.STEP for step in self._in_flight)
        segments: list[Segment] = []
        wants: list[Want] = []
        token_ids: list[int] = []
        owners: list[int] = []
        ended: list[int] = []
        given: list[int] = []
        draws: list[Draw] = []
        decoding, reading = self._next_parts(num_under_way)
        for state, num_tokens in (*decoding, *reading):
            pending = state.pending(num_tokens)
            start, end = state.num_sent, state.num_sent + len(pending)
            segments.append(Segment(state.slot, start, len(pending)))
            wants.append(state.want(len(pending)))
            token_ids += pending
            state.sent(SlotPart(self._next_step, len(segments) - 1, start, len(pending)))
            request = state.request
            if request.reader is not None and start < request.num_read:
                given += request.reader.given(start, end)
            elif wants[-1]:
                owners.append(request.request_id)
                if request.next_draw is not None:
                    draws.append(request.next_draw(0))
            if end == request.num_prompt and not request.max_tokens:
                ended.append(request.request_id)
        if not segments:
            return None
        header = StepHeader(StepKind.STEP, self._next_step, tuple(segments), tuple(wants))
        asked = Asked(tuple(given), tuple(draws)) if given or draws else NOTHING_ASKED
        requests = tuple(state.request.request_id for state, _ in (*decoding, *reading))
        return Step(
            header, tuple(token_ids), tuple(owners), bool(decoding), asked,
            requests=requests, num_read=len(token_ids) - len(decoding), ended=tuple(ended),
        )  # fmt: skip

    def _next_parts(self, num_under_way: int) -> tuple[list[Part], list[Part]]:
        """Who takes part in the next step: who has read his prompt, and who reads."""
        suspect = self.roster.suspects.alone(self._running)
        if suspect is not None:
            if num_under_way:
                return [], []
            state = self._running[suspect]
            alone = [(state, self._chunk_tokens((state,)))]
            return ([], alone) if state.num_prompt_left else (alone, [])
        left: list[RequestState] = []
        answered: list[RequestState] = []
        for state in self._running.values():
            (left if state.num_prompt_left else answered).append(state)
        left = [state for state in left if state.may_send]
        pace, num_stages = self._pace, self.limits.num_stages
        if not left:
            return (self._decoding(answered) if num_under_way < num_stages else []), []
        decoding, most = self._decoding(answered), self._chunk_tokens(left)
        if answered:
            most = pace.num_tokens(most, len(decoding))
        num_tokens = chunk_size(left, num_stages, pace.least_tokens, most)
        # Where stages are far from each other more chunks keep them busy.
        if num_under_way >= pace.num_steps(len(decoding) + num_tokens):
            return [], []
        return decoding, cut_prompts(left, num_tokens)

    def _chunk_tokens(self, states: Sequence[RequestState]) -> int:
        """Most tokens of these one's prompts in a step."""
        is_read = any(state.request.num_read for state in states)
        most = self.limits.chunk_tokens
        return min(most, MAX_READ_TOKENS) if is_read else most

    def _decoding(self, answered: Sequence[RequestState]) -> list[Part]:
        """A step's share of the requests that have read their prompt, with a token for each.

        None while as many of their steps are under way as there are shares: the one that comes back
        next makes a whole one with those that wait. Steps of prompts do not count: whoever they are
        of may want no second token, and so would never come.
        """
        ready, num_shares = shared_rows(answered, self.limits.num_stages, MIN_SHARE)
        if sum(step.is_decoding for step in self._in_flight) >= num_shares:
            return []
        return [(state, 1) for state in ready]

    def _keeps(self, length: int, held: int) -> bool:
        """Whether stages that hold so many tokens of a request can go back to `length`."""
        window = self.limits.window
        return window is None or window.keeps(length, held)

    def _advance(self, request_id: int, token_id: int, step: int) -> TokenEvent:
        """Note a token; of one that has given way since, it is as well as of any other."""
        waiting = self._waiting.get(request_id)
        state = self._running.pop(request_id) if waiting is None else waiting
        finish: FinishReason | None = FinishReason.LENGTH
        if token_id != NO_TOKEN:
            finish = state.add(token_id, self.pool.max_tokens)
        if waiting is not None:
            if finish is not None:
                self._waiting.remove(request_id)
        elif finish is None:
            self._running[request_id] = state  # behind those that have waited longer
        else:
            self.admission.leave(state)
            self.roster.notices.append(Done(request_id=request_id))
        return TokenEvent(request_id, token_id, step, finish, state.num_cached)
