"""The decode loop: many requests share one pipeline, joining and leaving at every step.

One task, no handovers: the scheduler says what to send, the pipeline brings it back, a request's
sampler chooses its token, and whoever asked hears of it.
"""

import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from time import perf_counter_ns
from typing import NoReturn

import trio

from pipeline.codecs.privacy_budget import PrivacyBudget
from pipeline.engine.admission import Transfer
from pipeline.engine.engine_stats import EngineStats
from pipeline.engine.generation import Generation, TokenOutput
from pipeline.engine.idle_prefixes import NO_PREFIXES, PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.engine.prompt_reader import PromptReader
from pipeline.engine.request import FinishReason, Request
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.step import Step
from pipeline.engine.step_choice import choice_of
from pipeline.engine.step_runner import RunnerStats, StepRunner
from pipeline.engine.stored_text import SlotStages
from pipeline.engine.token_stream import Listener, TokenStream
from pipeline.errors import (
    InputError,
    PromptError,
    RequestFailed,
    SessionError,
    StateRefused,
    StoreError,
)
from pipeline.protocol.result_kinds import NO_TOKEN, Result
from pipeline.protocol.step_header import StepKind
from pipeline.protocol.step_results import StepResult
from pipeline.sampling.sampler import Choice, Sampler
from pipeline.tasks import open_tasks
from transport.frozen import frozen

logger = logging.getLogger(__name__)


@frozen
class _Live:
    """A request under way: who chooses its tokens if not the last stage, and who hears of them."""

    sampler: Sampler | None
    listener: Listener
    reader: PromptReader | None = None


class PipelineEngine:
    """Requests on one side, a pipeline on the other; they advance while `run` is running."""

    def __init__(
        self,
        limits: Limits,
        budget: PrivacyBudget | None = None,
        prefixes: PrefixOptions = NO_PREFIXES,
    ) -> None:
        """`budget`: what may be told of all requests together, where that is bounded.

        `prefixes`: what of ended requests may stay on the stages, once `allow_reuse` has been
        called; with a budget nothing does, for noise is bound to the request that a row is of.
        """
        self._budget = budget
        self.failure: SessionError | None = None
        kept = NO_PREFIXES if budget else prefixes
        self.scheduler = Scheduler(limits, self._give_up, kept, trio.current_time)
        self._runner: StepRunner | None = None
        self._live: dict[int, _Live] = {}
        # What has come and its requests have not heard yet.
        self._outputs: deque[tuple[int, TokenOutput | RequestFailed]] = deque()
        self._request_ids: Iterator[int] = count()
        self._has_work = trio.Event()
        self._has_saved = trio.Event()
        self._num_steps = 0
        self._home_times: Counter[str] = Counter()
        self._num_tokens = 0
        self._last_batch = 0

    @property
    def max_seq_len(self) -> int:
        """Tokens a request may occupy, its prompt included."""
        return self.scheduler.pool.max_tokens

    @property
    def stats(self) -> EngineStats:
        """Counters for whoever watches."""
        runner = RunnerStats() if self._runner is None else self._runner.stats
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
            num_failovers=runner.num_failovers,
            last_batch=self._last_batch,
            num_handshakes=runner.num_handshakes,
            recovery_seconds=runner.recovery_seconds,
            home_times=dict(self._home_times),
            num_idle_prefixes=len(self.scheduler.admission.idle),
            num_prefix_hits=self.scheduler.admission.num_hits,
            num_cached_tokens=self.scheduler.admission.num_cached_tokens,
            pool_tokens=self.scheduler.pool.num_tokens or 0,
            held_tokens=self.scheduler.roster.num_held,
            num_given_way=self.scheduler.roster.num_given_way,
        )

    def allow_reuse(self, is_row_exact: bool) -> None:
        """Let requests go on from what others have left, if the stages say that rows are exact."""
        admission = self.scheduler.admission
        admission.allow_reuse(is_row_exact)
        if admission.idle.max_tokens and not is_row_exact:
            logger.info(
                "event=prefixes_off detail=%r", "rows of some stage's kernels are not exact"
            )

    async def run(self, pipeline: StepRunner) -> NoReturn:
        """Serve requests on `pipeline` until it fails, or this is cancelled because it has.

        Requests stay open then: rewind the `scheduler`, have its tokens replayed where they are
        lost, and run again; or `fail` them.
        """
        while True:
            await self.drain(pipeline)
            if self.scheduler.has_work:
                continue  # it came while the last of that was ending
            self._has_work = trio.Event()
            with trio.move_on_at(self.scheduler.admission.idle.next_expiry):
                await self._has_work.wait()

    async def drain(self, pipeline: StepRunner) -> None:
        """Run until no request is left; else as `run`.

        A step's tokens are handed out after the next step has been sent: turning them into text
        takes its time, and the stages need not wait for it.
        """
        self._runner = pipeline
        async with open_tasks() as tasks:
            await self._drain(pipeline, tasks)

    async def _drain(self, pipeline: StepRunner, tasks: trio.Nursery) -> None:
        scheduler = self.scheduler
        try:
            scheduler.admission.expire()
            while scheduler.has_work:
                self._has_work = trio.Event()
                while (step := scheduler.next_step()) is not None:
                    self._last_batch = len(step.header.segments)
                    self._note_rows(step)
                    if notices := scheduler.take_notices():
                        await pipeline.notify(notices)
                    await pipeline.send(step)
                self._hand_out()
                for transfer in scheduler.admission.take_transfers():
                    tasks.start_soon(self._transfer, transfer, pipeline)
                if not scheduler.has_steps:
                    await self._has_work.wait()
                    continue
                scheduler.admission.expire()
                # A step that is promised is sent even if nobody pays for its row.
                pipeline.prepare(None if self._budget else scheduler.follow_up())
                self._take(await pipeline.receive())
        finally:
            self._hand_out()  # the pipeline may fail with a step's tokens in hand: they count

    async def _transfer(self, transfer: Transfer, stages: SlotStages) -> None:
        """Load or save what a session has stored; without it a text takes longer, and no more."""
        state, is_done = transfer.state, True
        stored = state.request.stored
        assert stored is not None  # else nothing would be transferred
        try:
            if transfer.is_load:
                await stored.load(stages, state.slot, transfer.length)
            else:
                token_ids = state.known(0, state.num_known)
                await stored.save(stages, state.slot, token_ids, transfer.length)
        except (StateRefused, StoreError) as error:
            is_done = False
            kind = "load" if transfer.is_load else "save"
            logger.warning("event=session_%s_failed detail=%r", kind, str(error))
        if transfer.is_load:
            self.scheduler.loaded(transfer, is_done=is_done)
        else:
            self.scheduler.admission.saved(transfer)
        self._has_saved.set()
        self._has_work.set()

    async def wait_saved(self) -> None:
        """Return when what ended requests leave of their sessions is stored, or cannot be."""
        while self.scheduler.admission.has_transfers:
            self._has_saved = trio.Event()
            await self._has_saved.wait()

    def fail(self, error: SessionError) -> None:
        """Give up: every open request hears of it, and so does whoever comes later."""
        self.failure = error
        self.drop_all(error)

    def drop_all(self, error: SessionError) -> None:
        """Give every open request up, and tell it why; others may come."""
        live, self._live = self._live, {}
        for request_id, each in live.items():
            self.scheduler.cancel(request_id)
            each.listener(error)

    def submit(self, generation: Generation, listener: Listener) -> int:
        """Queue a request; returns what to `cancel` it by.

        `listener` is called by the loop itself, and so must be quick. Raises PromptError if the
        prompt can never fit, or would tell more than it may, InputError if there is no such
        chooser, SessionError after the pipeline has failed.
        """
        if self.failure is not None:
            raise SessionError(str(self.failure)) from self.failure
        sampler = generation.new_sampler()
        request_id = next(self._request_ids)
        want = generation.want
        request = Request(
            request_id,
            generation.prompt_ids,
            generation.max_tokens,
            generation.eos_token_ids,
            want,
            sampler.next_draw if sampler and want.result is Result.DRAWN else None,
            draw_behind=sampler.draw_behind if sampler and generation.masks else None,
            salt=generation.salt,
            stored=generation.stored,
            reader=generation.reader,
            client=generation.client,
        )
        if not request.num_prompt:  # of a single token, which nothing stands before
            listener(_NO_TOKEN)
            return request_id
        self.scheduler.submit(request)
        if self._budget is not None:
            try:
                self._budget.spend_prompt(request_id, len(request.prompt_ids))
            except PromptError:
                self.scheduler.cancel(request_id)
                raise
            _log_spent(self._budget)
        self._live[request_id] = _Live(sampler, listener, generation.reader)
        self._has_work.set()
        return request_id

    def cancel(self, request_id: int, *, keeps: bool = False) -> bool:
        """Give a request up, which then hears of nothing more; whether it was open.

        `keeps`: it has what it wanted, and what it leaves on the stages may be gone on from.
        """
        if self._live.pop(request_id, None) is None:
            return False
        self.scheduler.cancel(request_id, keeps=keeps)
        self._settle(request_id)
        self._has_work.set()
        return True

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncIterator[TokenStream]:
        """Generate while the context is open; leaving it aborts the rest. Raises: as `submit`.

        Who leaves by an exception, as whoever is cancelled does, leaves nothing on the stages.
        """
        stream = TokenStream(min(generation.max_tokens, self.max_seq_len) + 1)
        request_id = self.submit(generation, stream.hear)
        self._log("started", request_id, generation)
        keeps = False
        try:
            yield stream
            keeps = True
        finally:
            was_open = self.cancel(request_id, keeps=keeps)
            self._log("aborted" if was_open else "ended", request_id, generation)
            stream.close()

    def _log(self, what: str, request: int, generation: Generation) -> None:
        logger.debug(
            "event=generation_%s request_id=%s request=%d prompt_tokens=%d step=%d",
            what,
            generation.request_id,
            request,
            len(generation.prompt_ids),
            self._num_steps,
        )

    def _take(self, result: StepResult) -> None:
        start_ns = perf_counter_ns()
        choices = self._choose(result)
        times = result.home_times
        if times is not None:
            times["sample"] = times.get("sample", 0) + perf_counter_ns() - start_ns
            self._home_times.update(times)
        token_ids = [choice.token_id for choice in choices.values()]
        for event in self.scheduler.complete(result.header, token_ids):
            output = _NO_TOKEN
            if event.token_id != NO_TOKEN:
                choice = choices[event.request_id]
                output = TokenOutput(
                    *choice, event.finish, result.header.timings, times, event.num_cached
                )
            self._outputs.append((event.request_id, output))
            if self._budget is not None and event.finish is None:
                self._spend_token(self._budget, event.request_id)
        self._num_steps += 1

    def _hand_out(self) -> None:
        while self._outputs:
            request_id, output = self._outputs.popleft()
            live = self._live.get(request_id)
            if live is None:
                continue  # it has left since
            if isinstance(output, RequestFailed) or output.finish is not None:
                del self._live[request_id]
                self._settle(request_id)
            self._num_tokens += 1
            live.listener(output)

    def _spend_token(self, budget: PrivacyBudget, request_id: int) -> None:
        """Have a request end here if the row of its token may not be sent."""
        try:
            budget.spend_token(request_id)
        except RequestFailed as error:
            self._outputs.append((request_id, error))
            self.scheduler.cancel(request_id)

    def _note_rows(self, step: Step) -> None:
        """What is about to be sent is not given back, whatever becomes of it."""
        if self._budget is not None and step.header.kind is StepKind.STEP:
            for request_id, each in zip(step.requests, step.header.segments, strict=True):
                self._budget.will_send(request_id, each.position + each.num_tokens)

    def _settle(self, request_id: int) -> None:
        """Take back what a request that has ended paid for and has not sent."""
        if self._budget is not None and self._budget.close(request_id):
            _log_spent(self._budget)

    def _choose(self, result: StepResult) -> dict[int, Choice]:
        """A token for each of the step's owners; who gets none ends here. The rest is read."""
        step = self.scheduler.due(result.header)
        choices = {}
        for (owner, position), part in zip(step.answered(), result.segments(), strict=True):
            live = self._live.get(owner)
            has_token = bool(part.token_ids) or part.logits is not None
            if has_token:
                choices[owner] = _NO_CHOICE
            if live is None:  # it has left; a step with this very token may have been sent ahead
                if part.token_ids and part.token_ids[0] != NO_TOKEN:
                    choices[owner] = Choice(part.token_ids[0], None, ())
                continue
            try:
                if has_token:
                    choices[owner] = choice_of(part, live.sampler)
                elif live.reader is not None:
                    live.reader.take(position, part)
            except Exception as error:  # a processor may be anyone's code
                name = type(error).__name__
                logger.warning("event=sampling_failed request=%d type=%s", owner, name)
                if not isinstance(error, RequestFailed | InputError):
                    error = RequestFailed(f"choosing a token failed: {name}")
                self._fail_request(owner, error)
                self.scheduler.cancel(owner)
        return choices

    def _give_up(self, request_id: int, reason: str) -> None:
        logger.warning("event=request_given_up request=%d reason=%r", request_id, reason)
        self._fail_request(request_id, RequestFailed(reason))

    def _fail_request(self, request_id: int, error: RequestFailed | InputError) -> None:
        self._settle(request_id)
        self._live.pop(request_id).listener(error)


def _log_spent(budget: PrivacyBudget) -> None:
    spent = budget.num_spent
    epsilon = budget.composed_epsilon(spent)
    logger.info("event=privacy_spent rows_in_all=%d epsilon=%.4g", spent, epsilon)


_NO_CHOICE = Choice(0, None, ())
_NO_TOKEN = TokenOutput(NO_TOKEN, None, (), FinishReason.LENGTH)
