"""Continuous batching: many requests share one pipeline, joining and leaving at every step."""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import NoReturn

import trio

from pipeline.engine.drive import RunnerStats, StepRunner
from pipeline.engine.generation import Generation, TokenOutput
from pipeline.engine.request import Request
from pipeline.engine.scheduler import Limits, Scheduler
from pipeline.errors import PipelineError, RequestFailed, SessionError
from pipeline.protocol.results import SegmentResult, StepResult
from pipeline.protocol.wants import NO_TOKEN, Result, Want
from pipeline.sampling.draw import NO_NUMBERS
from pipeline.sampling.sampler import Choice, Sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine is doing now, and has done."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_tokens: int
    num_failovers: int
    last_batch: int
    # Handshakes with stages so far, and how long the last recovery took; 0 before the first.
    num_handshakes: int = 0
    recovery_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Live:
    """A request under way: who chooses its tokens when not the last stage, and who hears of them.

    The channel has room for every token the request can have, so a client that reads slowly never
    holds up the others.
    """

    sampler: Sampler | None
    outputs: trio.MemorySendChannel[TokenOutput]
    stream: "TokenStream"

    def fail(self, error: PipelineError) -> None:
        """No token comes any more, for this reason."""
        self.stream.failure = error
        self.outputs.close()


class TokenStream(trio.abc.ReceiveChannel[TokenOutput]):
    """A request's tokens as they come."""

    def __init__(self, outputs: trio.MemoryReceiveChannel[TokenOutput]) -> None:
        # Why it ended without a last token.
        self.failure: PipelineError | None = None
        self._outputs = outputs

    async def receive(self) -> TokenOutput:
        """The next token.

        Raises trio.EndOfChannel after the last, SessionError when the pipeline has failed,
        RequestFailed when only this request has.
        """
        try:
            return await self._outputs.receive()
        except trio.EndOfChannel:
            if self.failure is None:
                raise
            raise self.failure from None

    async def aclose(self) -> None:
        """Stop listening."""
        await self._outputs.aclose()


class PipelineEngine:
    """Requests on one side, a pipeline on the other; they advance while `run` is running."""

    def __init__(self, limits: Limits) -> None:
        self.failure: SessionError | None = None
        self.scheduler = Scheduler(limits, self._give_up)
        self._runner: StepRunner | None = None
        self._live: dict[int, _Live] = {}
        self._request_ids: Iterator[int] = count()
        self._has_work = trio.Event()
        self._num_steps = 0
        self._num_tokens = 0
        self._last_batch = 0

    @property
    def max_seq_len(self) -> int:
        """Tokens a request may occupy, its prompt included."""
        return self.scheduler.limits.max_seq_len

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
        )

    async def run(self, pipeline: StepRunner) -> NoReturn:
        """Serve requests on `pipeline` until it fails, or this is cancelled because it has.

        Requests stay open then: rewind the `scheduler`, have its tokens replayed where they are
        lost, and run again; or `fail` them.
        """
        self._runner = pipeline
        while True:
            await self._work(pipeline)

    def fail(self, error: SessionError) -> None:
        """Give up: every open request hears of it, and so does whoever comes later."""
        self.failure = error
        for live in self._live.values():
            live.fail(error)
        self._live.clear()

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncIterator[TokenStream]:
        """Generate while the context is open; leaving it aborts what is left.

        Raises PromptError if the prompt can never fit, SessionError after the pipeline has failed.
        """
        if self.failure is not None:
            raise SessionError(str(self.failure)) from self.failure
        request_id = next(self._request_ids)
        want, sampler = generation.want, None
        if want != Want.TOKEN:
            sampler = Sampler(generation.sampling, generation.prompt_ids, generation.processors)
        request = Request(
            request_id,
            generation.prompt_ids,
            generation.max_tokens,
            generation.eos_token_ids,
            want,
            sampler.next_draw if sampler and want.result is Result.DRAWN else None,
        )
        self.scheduler.submit(request)
        room = min(generation.max_tokens, self.max_seq_len) + 1
        send, receive = trio.open_memory_channel[TokenOutput](room)
        stream = TokenStream(receive)
        self._live[request_id] = _Live(sampler, send, stream)
        self._has_work.set()
        self._log("started", request_id, generation)
        try:
            yield stream
        finally:
            is_open = self._live.pop(request_id, None) is not None
            if is_open:
                self.scheduler.cancel(request_id)
                self._has_work.set()
            self._log("aborted" if is_open else "ended", request_id, generation)
            send.close()
            receive.close()

    def _log(self, what: str, request: int, generation: Generation) -> None:
        logger.debug(
            "event=generation_%s request_id=%s request=%d prompt_tokens=%d step=%d",
            what,
            generation.request_id,
            request,
            len(generation.prompt_ids),
            self._num_steps,
        )

    async def _work(self, pipeline: StepRunner) -> None:
        """Everything there is to do; then wait until there is more."""
        scheduler = self.scheduler
        while scheduler.has_work:
            while (step := scheduler.next_step()) is not None:
                self._last_batch = len(step.header.segments)
                await pipeline.send(step)
            self._deliver(await pipeline.receive())
        self._has_work = trio.Event()
        await self._has_work.wait()

    def _deliver(self, result: StepResult) -> None:
        choices = self._choose(result)
        token_ids = [choice.token_id for choice in choices.values()]
        for event in self.scheduler.complete(result.header, token_ids):
            live = self._live.get(event.request_id)
            if live is None:
                continue  # its sampler failed at this very token
            choice = choices[event.request_id]
            with suppress(trio.BrokenResourceError):  # it listens no more, and is about to leave
                live.outputs.send_nowait(
                    TokenOutput(choice.token_id, choice.logprob, choice.top, event.finish)
                )
            if event.finish is not None:
                del self._live[event.request_id]
                live.outputs.close()
        self._num_steps += 1
        self._num_tokens += len(choices)

    def _choose(self, result: StepResult) -> dict[int, Choice]:
        """A token for each of the step's owners; who gets none ends here."""
        owners = self.scheduler.owners(result.header)
        choices = {}
        for owner, part in zip(owners, result.segments(), strict=True):
            choices[owner] = _NO_CHOICE
            live = self._live.get(owner)
            if live is None:
                continue  # cancelled meanwhile
            try:
                choices[owner] = choice_of(part, live.sampler)
            except Exception as error:  # a processor may be anyone's code
                name = type(error).__name__
                logger.warning("event=sampling_failed request=%d type=%s", owner, name)
                if not isinstance(error, RequestFailed):
                    error = RequestFailed(f"choosing a token failed: {name}")
                live.fail(error)
                del self._live[owner]
                self.scheduler.cancel(owner)
        return choices

    def _give_up(self, request_id: int) -> None:
        logger.warning("event=request_given_up request=%d", request_id)
        live = self._live.pop(request_id)
        live.fail(RequestFailed("stages were lost whenever this request was computed"))


_NO_CHOICE = Choice(0, None, ())


def choice_of(part: SegmentResult, sampler: Sampler | None) -> Choice:
    """The next token of a request, from its part of a result.

    Chosen here from logits, else the last stage's word. Raises RequestFailed where that has none to
    give, and whatever a processor raises.
    """
    if sampler is not None and part.logits is not None:
        return sampler.choose(part.logits[-1])
    (token_id,) = part.token_ids
    if token_id == NO_TOKEN:
        raise RequestFailed(f"{NO_NUMBERS}, or bias and mask leave none")
    if sampler is not None:
        sampler.took(token_id)
    if not part.logprobs.size:
        return Choice(token_id, None, ())
    logprob, *rest = part.logprobs[0].tolist()
    top = zip(part.top_ids[0].tolist(), rest, strict=True)
    return Choice(token_id, logprob, tuple(each for each in top if each[0] != NO_TOKEN))
