"""The stages of a manifest joined up: steps run on them, and what is lost is replaced."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import trio

from pipeline.agreement.manifest import Manifest
from pipeline.engine.limits import Limits
from pipeline.engine.step import FollowUp, Notice, Step
from pipeline.engine.step_runner import RunnerStats
from pipeline.errors import LinkLost, SessionError, StageLost, StageMismatch, StageSilent
from pipeline.orchestrator.connector import Connector
from pipeline.orchestrator.epochs import Epochs, ReplaySource
from pipeline.orchestrator.loss_record import Losses
from pipeline.orchestrator.model_ends import REMOTE_ENDS, ModelEnds
from pipeline.orchestrator.slot_orders import SlotOrders
from pipeline.orchestrator.stage_watch import HEALTH_SECONDS, Expectation, RemoteStage
from pipeline.orchestrator.step_link import StepLink
from pipeline.placement.base import Placement, Progress
from pipeline.protocol.kv_pool import KVPool
from pipeline.protocol.messages import Ready, Shutdown, Start
from pipeline.protocol.peer_connections import GOODBYE_SECONDS
from pipeline.protocol.step_results import StepResult
from pipeline.protocol.stored_state import Mark, StoredSlot
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits
from pipeline.tasks import open_tasks
from transport.dial_and_listen import Endpoint, Listener
from transport.frozen import frozen

logger = logging.getLogger(__name__)


@frozen
class PipelineOptions:
    """What the user may choose beside the manifest."""

    limits: Limits
    times: TimeLimits = DEFAULT_TIMES
    data_out_listen: Endpoint | None = None
    # How long to wait for a result in place (`SecureChannel.wait_in_place`), where nothing else has
    # to run in this process meanwhile. 0: through the event loop alone.
    patience_ms: int = 0
    # What holds the ends of the model: `ClientEnds` where the manifest's split is client.
    ends: ModelEnds = REMOTE_ENDS


class Pipeline:
    """Stages joined up: steps go in, their results come out in order.

    What is lost is replaced by `connect`, and only that; every other stage goes back to what is
    certain, keeps its session and its KV state, and meets its neighbours afresh.
    """

    def __init__(
        self,
        manifest: Manifest,
        options: PipelineOptions,
        placement: Placement,
        connector: Connector,
        listener: Listener | None,
        tasks: trio.Nursery,
    ) -> None:
        """`tasks` watch the stages for as long as they are there."""
        self.num_results = 0
        self._manifest = manifest
        self._options = options
        self._placement = placement
        self._connector = connector
        self._tasks = tasks
        self._stages: dict[int, RemoteStage] = {}
        # Since when stages are not there.
        now = trio.current_time()
        self._away = dict.fromkeys(range(len(manifest.stages)), now)
        # Requests that have started and not ended: a stage that comes later hears of them too.
        self._started: dict[int, Start] = {}
        self._losses = Losses()
        self._epochs = Epochs(connector, listener, options.patience_ms, options.ends)
        self._link: StepLink | None = None
        self._orders = SlotOrders()
        tasks.start_soon(self._watch_progress)

    @property
    def manifest(self) -> Manifest:
        """Whose stages these are."""
        return self._manifest

    @property
    def stats(self) -> RunnerStats:
        """Counters so far."""
        losses = self._losses
        return RunnerStats(
            self._connector.num_handshakes, losses.num_failovers, losses.recovery_seconds
        )

    @property
    def ready(self) -> tuple[Ready, ...]:
        """What the stages told of themselves when they were last joined up."""
        return self._epochs.ready

    @property
    def vocab_size(self) -> int:
        """Of the model; 0 before the stages have told."""
        return min((each.vocab_size for each in self.ready), default=0)

    @property
    def kv_pool(self) -> KVPool | None:
        """The smallest stage's, which is all that there is; None where slots share nothing."""
        told = [(each.kv_tokens, each.kv_bytes) for each in self.ready]
        pools = [KVPool(tokens, size) for tokens, size in told if tokens is not None]
        return min(pools, default=None)

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
        return self._link is not None and not self.is_broken

    @property
    def is_broken(self) -> bool:
        """Whether something has been lost since the stages were last joined up."""
        return self._losses.is_broken

    @property
    def waiting_for(self) -> str:
        """What the connection still lacks, for the user."""
        problems = [f"stage {idx} cannot start: {said}" for idx, said in self.problems.items()]
        lacking = [*problems, *self._connector.pending.values()]
        return "; ".join(lacking) or "the stages did not become ready"

    @property
    def away(self) -> Mapping[int, float]:
        """The stages that are not there, and since when, by trio's clock."""
        return self._away

    @property
    def progress(self) -> Mapping[int, Progress]:
        """How far the stages have come that are not up, where that can be told."""
        told = {idx: self._placement.progress(idx) for idx in self._connector.absent}
        return {idx: progress for idx, progress in told.items() if progress is not None}

    @property
    def problems(self) -> Mapping[int, str]:
        """Why stages that are not there cannot be started, where that is known."""
        told = {idx: self._placement.problem(idx) for idx in self._away}
        return {idx: problem for idx, problem in told.items() if problem is not None}

    async def send(self, step: Step) -> None:
        """Send a step to the first stage. Raises LinkLost."""
        await self._joined().send(step)

    def prepare(self, follow_up: FollowUp | None) -> None:
        """What to send the moment the next result comes, before that is even looked at whole."""
        if self._link is not None:
            self._link.prepare(follow_up)

    async def receive(self) -> StepResult:
        """The oldest outstanding step's result, the stages' timings in its header.

        Raises LinkLost, or MessageError for a result that cannot be.
        """
        result = await self._joined().receive()
        self.num_results += 1
        if self._losses.is_recovering or self._epochs.is_unproven:
            self._note_proof()
        return result

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

    async def save(self, slot: int, end: int, stored: StoredSlot) -> Sequence[Sequence[Mark]]:
        """See `SlotStages.save`."""
        return await self._orders.save(self.stages, slot, end, stored)

    async def load(self, slot: int, length: int, stored: StoredSlot) -> None:
        """See `SlotStages.load`."""
        await self._orders.load(self.stages, slot, length, stored)

    def unbroken(self) -> AbstractAsyncContextManager[None]:
        """The body is cancelled by the loss of a stage or link, which is raised in its place."""
        return self._losses.unbroken()

    async def explain(self, failure: SessionError) -> SessionError:
        """The loss behind a failure, which may have been the first sign of it."""
        return await self._losses.explain(failure)

    async def connect(self, source: ReplaySource | None = None) -> None:
        """Join all stages up, those that are missing once they are there, and replay to them.

        Raises SessionError or StageLost naming the stage that is refused or lost on the way; then
        it may be called again.
        """
        self._losses.forget()
        self._connector.pending.clear()
        async with self.unbroken():
            for stage in self.stages:
                stage.end_epoch()  # at once: what they say of links that end now is no new loss
            await self._drop_link()
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
        link, self._link = self._link, None
        if link is not None:
            await (link.hang_up() if self.is_broken else link.aclose())
        for stage in self._stages.values():
            await stage.aclose()

    def _joined(self) -> StepLink:
        if self._link is None:
            raise LinkLost(0, "it is not connected")
        return self._link

    async def _begin_epoch(self, source: ReplaySource | None) -> None:
        """Put every stage where the work is certain to be, and let it flow again."""
        await trio.lowlevel.checkpoint_if_cancelled()  # a stage lost this moment is not there
        stages = self.stages
        lengths = list(source.rewind()) if source else [0] * self._options.limits.num_slots
        plan = self._epochs.plan(stages, is_whole=source is not None and source.must_rebuild)
        self._link = await self._epochs.begin(stages, lengths, plan)
        self._losses.has_stood = True
        if source is not None:
            pool = self.kv_pool
            if not source.use_pool(None if pool is None else pool.num_tokens):
                raise SessionError("a stage that was replaced has less KV memory than is in use")
            await self._epochs.replay(self._link, source, plan)
        if not any(lengths):
            self._losses.note_recovery()

    async def _meet(self, stage_idx: int) -> None:
        """Open a missing stage's control channel, and watch it from then on."""
        self._connector.absent.add(stage_idx)  # until there is somewhere to dial
        await self._placement.start(stage_idx)
        self._connector.absent.discard(stage_idx)
        try:
            control = await self._connector.control(stage_idx)
        except (StageSilent, StageMismatch) as error:
            self._placement.on_loss(error)
            raise

        def on_waiting(text: str) -> None:
            self._connector.pending[f"stage {stage_idx}"] = text

        is_last = stage_idx == len(self._manifest.stages) - 1
        expected = Expectation(self._manifest.stage(stage_idx), is_last)
        address = str(self._placement.where(stage_idx).control.to_endpoint())
        stage = RemoteStage(expected, control, on_waiting, self._losses.fail, address)
        stage.note(self._started.values())
        self._stages[stage_idx] = stage
        del self._away[stage_idx]
        self._tasks.start_soon(self._watch, stage)

    async def _watch(self, stage: RemoteStage) -> None:
        try:
            await stage.watch(self._options.times.idle_seconds)
        except SessionError as error:
            del self._stages[stage.idx]
            self._away[stage.idx] = trio.current_time()
            self._losses.fail(error)
            self._placement.on_loss(error)
        await stage.aclose()

    async def _watch_progress(self) -> None:
        """Lose links that hang: all stages answer, steps are under way, and none is computed."""
        while True:
            link, num_done = self._link, self._num_done
            is_due = self.is_joined and link is not None and link.num_due > 0
            await trio.sleep(max(self._options.times.idle_seconds, 2 * HEALTH_SECONDS))
            if is_due and self.is_joined and (link, num_done) == (self._link, self._num_done):
                error = "steps are under way and none moves: a data channel hangs"
                self._losses.fail(SessionError(error))

    @property
    def _num_done(self) -> int:
        told = [stage.figures.num_steps for stage in self.stages if stage.figures is not None]
        return self.num_results + sum(told)

    async def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.hang_up()

    def _note_proof(self) -> None:
        self._epochs.note_proof()
        if not self.is_broken:  # else it is one that was still on its way when something was lost
            self._losses.note_recovery()
