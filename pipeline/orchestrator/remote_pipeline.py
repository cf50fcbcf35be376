"""The stages of a manifest joined up: steps run on them, and what is lost is replaced."""

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from pipeline.agreement.manifest import Manifest
from pipeline.engine.runner import RunnerStats
from pipeline.engine.scheduler import Limits
from pipeline.engine.step import FollowUp, Notice, Step
from pipeline.errors import (
    LinkLost,
    MessageError,
    SessionError,
    StageHung,
    StageLost,
)
from pipeline.orchestrator.ahead import Ahead
from pipeline.orchestrator.connector import Connector
from pipeline.orchestrator.remote_stage import HEALTH_SECONDS, Expectation, RemoteStage
from pipeline.protocol.links import StepGate, receive_step, send_step
from pipeline.protocol.messages import Init, Ready, Rewind, Shutdown, Start, StepKind
from pipeline.protocol.peers import GOODBYE_SECONDS, describe, hang_up
from pipeline.protocol.replay import ORCHESTRATOR_IDX, ReplayPlan, plan_replay
from pipeline.protocol.results import StepResult, step_result
from pipeline.protocol.steps import step_tensors
from pipeline.protocol.wants import NO_TOKEN
from pipeline.tasks import open_tasks
from transport.channel import SecureChannel
from transport.endpoint import Endpoint, Listener
from transport.errors import TransportError

logger = logging.getLogger(__name__)

# A stage computes a chunk without looking up; one that answers nothing for this long is hung.
HANG_SECONDS = 60.0
# When a data channel breaks, the control channel of the stage that died ends at the same moment;
# its neighbours' complaints may only be quicker.
BLAME_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """What the user may choose beside the manifest. `on_loss` hears of every stage that is lost."""

    limits: Limits
    connect_seconds: float
    data_out_listen: Endpoint | None = None
    hang_seconds: float = HANG_SECONDS
    on_loss: Callable[[SessionError], None] = lambda _: None
    # How long to wait for a result in place (`SecureChannel.wait_in_place`), where nothing else has
    # to run in this process meanwhile. 0: through the event loop alone.
    patience_ms: int = 0


class ReplaySource(Protocol):
    """What is certain of the work so far, and how to do it again: a `Scheduler`."""

    @property
    def has_work(self) -> bool:
        """Whether anything is left to do."""
        ...

    @property
    def num_given_up(self) -> int:
        """Requests given up because stages were lost whenever they were tried."""
        ...

    def rewind(self) -> Sequence[int]:
        """Forget what is under way; the tokens that each slot is certain to hold."""
        ...

    def replay(self, until: int) -> Iterator[Step]:
        """The steps of those tokens, for stages 0 to `until`."""
        ...


@dataclass(frozen=True, slots=True)
class _Links:
    """The data channels of one epoch."""

    data_in: SecureChannel
    data_out: SecureChannel
    gate: StepGate
    ahead: Ahead


class Pipeline:
    """Stages joined up: steps go in, their results come out in order.

    What is lost is replaced by `connect`, and only that; every other stage goes back to what is
    certain, keeps its session and its KV state, and meets its neighbours afresh.
    """

    def __init__(
        self,
        manifest: Manifest,
        options: PipelineOptions,
        connector: Connector,
        listener: Listener,
        tasks: trio.Nursery,
    ) -> None:
        """`tasks` watch the stages for as long as they are there."""
        self.ready: tuple[Ready, ...] = ()
        self.vocab_size = 0
        self.num_results = 0
        self._manifest = manifest
        self._options = options
        self._connector = connector
        self._listener = listener
        self._tasks = tasks
        self._stages: dict[int, RemoteStage] = {}
        self._links: _Links | None = None
        # Requests that have started and not ended: a stage that comes later hears of them too.
        self._started: dict[int, Start] = {}
        # Steps under way on these links.
        self._num_due = 0
        # Rebuilt, and no result has come since that would prove it complete.
        self._unproven: frozenset[int] = frozenset()
        self._failure: SessionError | None = None
        self._scope = trio.CancelScope()
        self._lost_at: float | None = None
        self._num_failovers = 0
        self._recovery_seconds = 0.0
        tasks.start_soon(self._watch_progress)

    @property
    def stats(self) -> RunnerStats:
        """Counters so far."""
        return RunnerStats(
            self._connector.num_handshakes, self._num_failovers, self._recovery_seconds
        )

    @property
    def stages(self) -> Sequence[RemoteStage]:
        """The stages that are there, for whoever watches."""
        return [self._stages[idx] for idx in sorted(self._stages)]

    @property
    def is_row_exact(self) -> bool:
        """Whether a row comes out the same, bit for bit, whatever steps its text was computed in.

        Only where all stages say so; of stages that have said nothing yet it is not known.
        """
        return bool(self.ready) and all(each.is_row_exact for each in self.ready)

    @property
    def is_joined(self) -> bool:
        """Whether steps can flow."""
        return self._links is not None and not self.is_broken

    @property
    def is_broken(self) -> bool:
        """Whether something has been lost since the stages were last joined up."""
        return self._failure is not None

    @property
    def waiting_for(self) -> str:
        """What the connection still lacks, for the user."""
        return "; ".join(self._connector.pending.values()) or "the stages did not become ready"

    async def send(self, step: Step) -> None:
        """Send a step to the first stage."""
        links = self._joined()
        self._num_due += step.header.kind is not StepKind.REPLAY
        if links.ahead.has_sent(step.header):
            return
        tensors = step_tensors(step.header, step.token_ids, step.asked)
        try:
            await send_step(links.data_in, step.header, tensors)
        except (TransportError, trio.ClosedResourceError) as error:
            raise LinkLost(0, f"its data channel broke: {describe(error)}") from error

    def prepare(self, follow_up: FollowUp | None) -> None:
        """What to send the moment the next result comes, before that is even looked at whole."""
        if self._links is not None:
            self._links.ahead.prepare(follow_up)

    async def receive(self) -> StepResult:
        """The oldest outstanding step's result, the stages' timings in its header."""
        links, last = self._joined(), len(self._manifest.stages) - 1
        try:
            if links.ahead.is_prepared:
                await self._send_ahead(links)
            header, tensors = await receive_step(links.data_out, links.gate)
        except (TransportError, trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise LinkLost(last, f"its data channel broke: {describe(error)}") from error
        result = step_result(header, tensors)
        for token_id in result.all_ids():
            if token_id >= self.vocab_size and token_id != NO_TOKEN:
                raise MessageError(
                    f"stage {last} returned a token outside the vocabulary of {self.vocab_size}"
                )
        self.num_results += 1
        self._num_due -= 1
        if self._unproven or self._lost_at is not None:
            self._note_proof()
        return result

    async def _send_ahead(self, links: _Links) -> None:
        """Wait for the next result, and send the step that has been prepared for it."""
        if not self._options.patience_ms:
            await links.data_out.wait_readable()
        plain = await links.data_out.peek()
        form = None if plain is None else links.ahead.follow(plain, self.vocab_size)
        if form is not None:
            try:
                await links.data_in.send_form(form)
            except (TransportError, trio.ClosedResourceError) as error:
                raise LinkLost(0, f"its data channel broke: {describe(error)}") from error

    async def notify(self, notices: Sequence[Notice]) -> None:
        """Tell every stage about requests' lives. Raises StageLost: the others hear of it later."""
        for notice in notices:
            if isinstance(notice, Start):
                self._started[notice.request_id] = notice
            else:
                self._started.pop(notice.request_id, None)
        stages = self.stages
        for stage in stages:
            stage.note(notices)
        for stage in stages:
            await stage.tell()

    @asynccontextmanager
    async def unbroken(self) -> AsyncIterator[None]:
        """The body is cancelled by the loss of a stage or link, which is raised in its place."""
        outer = self._scope
        has_failed = False
        try:
            with trio.CancelScope() as scope:
                self._scope = scope
                if self._failure is not None:
                    scope.cancel()
                yield
        except SessionError as error:
            self.fail(error)
            has_failed = True
        finally:
            self._scope = outer
        if has_failed or scope.cancelled_caught:
            assert self._failure is not None  # that is why
            raise self._failure

    async def explain(self, failure: SessionError) -> SessionError:
        """A broken link is often the first sign of a stage's death: wait for what says so."""
        if isinstance(failure, LinkLost):
            await trio.sleep(BLAME_SECONDS)
        return self._failure or failure

    def fail(self, error: SessionError) -> None:
        """Note a loss, and end what is being done. A stage's loss explains more than a link's."""
        if self._failure is None or isinstance(self._failure, LinkLost):
            self._failure = error
        if self.ready and self._lost_at is None:
            self._lost_at = trio.current_time()
        self._scope.cancel()

    async def connect(self, source: ReplaySource | None = None) -> None:
        """Join all stages up, those that are missing once they are there, and replay to them.

        Raises SessionError or StageLost naming the stage that is refused or lost on the way; then
        it may be called again.
        """
        self._failure = None
        self._connector.pending.clear()
        async with self.unbroken():
            for stage in self.stages:
                stage.end_epoch()  # at once: what they say of links that end now is no new loss
            await self._drop_links()
            async with open_tasks() as tasks:
                for spec in self._manifest.stages:
                    if spec.stage_idx not in self._stages:
                        tasks.start_soon(self._meet, spec.stage_idx)
            await self._begin_epoch(source)

    async def say_goodbye(self) -> None:
        """End the session, last stage first: each still hears of it before its neighbour leaves."""
        with trio.move_on_after(GOODBYE_SECONDS, shield=True):
            for idx in sorted(self._stages, reverse=True):
                try:
                    await self._stages[idx].send(Shutdown())
                except StageLost as error:
                    logger.debug("event=goodbye_failed stage=%d error=%s", idx, error)

    async def aclose(self) -> None:
        """Close every channel that is open."""
        await self._drop_links()
        for stage in self._stages.values():
            await stage.aclose()

    def _joined(self) -> _Links:
        if self._links is None:
            raise LinkLost(0, "it is not connected")
        return self._links

    async def _begin_epoch(self, source: ReplaySource | None) -> None:
        """Put every stage where the work is certain to be, and let it flow again."""
        await trio.lowlevel.checkpoint_if_cancelled()  # a stage lost this moment is not there
        epoch = os.urandom(16)
        stages = self.stages
        replay = self._plan_replay(stages)
        self._unproven = replay.rebuilt
        lengths = list(source.rewind()) if source else [0] * self._options.limits.num_slots
        for stage in stages:
            await stage.begin(self._opening(stage, epoch, lengths, replay))
            await stage.tell()
        await self._join(stages, epoch)
        until = replay.sources.get(ORCHESTRATOR_IDX)
        if source is not None and until is not None:
            for step in source.replay(until):
                await self.send(step)
        if not any(lengths):
            self._note_recovery()

    def _plan_replay(self, stages: Sequence[RemoteStage]) -> ReplayPlan:
        new = {stage.idx for stage in stages if not stage.has_begun}
        keepers = {stage.idx for stage in stages if stage.keeps_activations}
        return plan_replay(new | self._unproven, keepers)

    def _opening(
        self, stage: RemoteStage, epoch: bytes, lengths: Sequence[int], replay: ReplayPlan
    ) -> Init | Rewind:
        if not stage.has_begun:
            return self._connector.init(stage.idx, epoch)
        is_rebuilt = stage.idx in replay.rebuilt
        return Rewind(
            epoch=epoch,
            lengths=[0] * len(lengths) if is_rebuilt else list(lengths),
            replay_until=replay.sources.get(stage.idx),
        )

    async def _meet(self, stage_idx: int) -> None:
        """Open a missing stage's control channel, and watch it from then on."""
        try:
            control = await self._connector.control(stage_idx)
        except StageHung as error:
            self._options.on_loss(error)
            raise

        def on_waiting(text: str) -> None:
            self._connector.pending[f"stage {stage_idx}"] = text

        is_last = stage_idx == len(self._manifest.stages) - 1
        expected = Expectation(self._manifest.stage(stage_idx), is_last)
        stage = RemoteStage(expected, control, on_waiting, self.fail)
        stage.note(self._started.values())
        self._stages[stage_idx] = stage
        self._tasks.start_soon(self._watch, stage)

    async def _watch(self, stage: RemoteStage) -> None:
        try:
            await stage.watch(self._options.hang_seconds)
        except SessionError as error:
            del self._stages[stage.idx]
            self.fail(error)
            self._options.on_loss(error)
        await stage.aclose()

    async def _watch_progress(self) -> None:
        """Lose links that hang: all stages answer, steps are under way, and none is computed."""
        while True:
            is_due = self.is_joined and self._num_due > 0
            before = self._links, self._num_done
            await trio.sleep(max(self._options.hang_seconds, 2 * HEALTH_SECONDS))
            if is_due and self.is_joined and before == (self._links, self._num_done):
                self.fail(SessionError("steps are under way and none moves: a data channel hangs"))

    @property
    def _num_done(self) -> int:
        told = [stage.figures.num_steps for stage in self.stages if stage.figures is not None]
        return self.num_results + sum(told)

    async def _join(self, stages: Sequence[RemoteStage], epoch: bytes) -> None:
        """Open this epoch's data channels, and wait until every stage has its own."""
        gate = self._connector.new_gate()
        links: dict[str, SecureChannel] = {}

        async def accept_results() -> None:
            links["out"] = await self._connector.results(self._listener, epoch, gate)

        try:
            async with open_tasks() as tasks:
                tasks.start_soon(accept_results)
                links["in"] = await self._connector.first(epoch)
            ready = []
            for stage in stages:
                what = f"stage {stage.idx}"
                self._connector.pending.setdefault(what, f"{what} is not ready")
                ready.append(await stage.ready())
                del self._connector.pending[what]
        except BaseException:
            for channel in links.values():
                await hang_up(channel)
            raise
        self.ready = tuple(ready)
        self.vocab_size = min(each.vocab_size for each in ready)
        self._connector.vocab_size = self.vocab_size
        links["out"].wait_in_place(self._options.patience_ms)
        self._links = _Links(links["in"], links["out"], gate, Ahead(len(stages)))
        self._num_due = 0

    async def _drop_links(self) -> None:
        links, self._links = self._links, None
        if links is not None:
            await hang_up(links.data_in)
            await hang_up(links.data_out)

    def _note_proof(self) -> None:
        """A result has come through all stages, and behind all replays."""
        self._unproven = frozenset()
        if not self.is_broken:  # else it is one that was still on its way when something was lost
            self._note_recovery()

    def _note_recovery(self) -> None:
        if self._lost_at is None:
            return
        self._recovery_seconds = trio.current_time() - self._lost_at
        self._lost_at = None
        self._num_failovers += 1
        logger.warning("event=failover_complete seconds=%.3f", self._recovery_seconds)
