"""From one loss to the next: every stage put where the work is certain to be, on new channels."""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from pipeline.engine.step import Step
from pipeline.errors import SessionError
from pipeline.orchestrator.connector import Connector
from pipeline.orchestrator.model_ends import ModelEnds
from pipeline.orchestrator.replay_plan import ORCHESTRATOR_IDX, ReplayPlan, plan_replay
from pipeline.orchestrator.stage_watch import RemoteStage
from pipeline.orchestrator.step_link import StepLink
from pipeline.protocol.messages import Init, Ready, Rewind
from pipeline.protocol.peer_connections import hang_up
from pipeline.tasks import open_tasks
from transport.channel import SecureChannel
from transport.dial_and_listen import Listener

logger = logging.getLogger(__name__)


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

    @property
    def must_rebuild(self) -> bool:
        """Whether stages that have done what is forgotten cannot go back to these."""
        ...

    def use_pool(self, num_tokens: int | None) -> bool:
        """Hear what stages have room for together; whether what is to be replayed fits."""
        ...

    def replay(self, until: int) -> Iterator[Step]:
        """The steps of those tokens, for stages 0 to `until`."""
        ...


class Epochs:
    """Begins epochs: tells stages where to go back to, joins them up, and replays what is lost."""

    def __init__(
        self, connector: Connector, listener: Listener | None, patience_ms: int, ends: ModelEnds
    ) -> None:
        """`listener` takes the last stage's results; without one that is dialed for them.

        `patience_ms`: see `wait_in_place`.
        """
        self._ends = ends
        self.ready: tuple[Ready, ...] = ()
        self._connector = connector
        self._listener = listener
        self._patience_ms = patience_ms
        # Rebuilt, and no result has come since that would prove it complete.
        self._unproven: frozenset[int] = frozenset()
        # Asked to go on from what they find, and no result has come since.
        self._gone_on: frozenset[int] = frozenset()
        # The names of what stages hold, of those where it outlives the worker; and of what those
        # are to go on from that have not been ready since.
        self._kept: dict[int, bytes] = {}
        self._asked: dict[int, bytes] = {}

    @property
    def is_unproven(self) -> bool:
        """Whether no result has come yet through what was rebuilt."""
        return bool(self._unproven | self._gone_on)

    def note_proof(self) -> None:
        """A result has come through all stages, and behind all replays."""
        self._unproven = self._gone_on = frozenset()

    def plan(self, stages: Sequence[RemoteStage], *, is_whole: bool = False) -> ReplayPlan:
        """Who begins with nothing, which with `is_whole` all do, and who replays for them.

        A new worker is to go on from what the one before it held, where that is kept, and is not
        perhaps why that one has died.
        """
        new = {stage.idx for stage in stages if not stage.has_begun}
        lost = new - (self._kept.keys() - self._gone_on)
        lost = {stage.idx for stage in stages} if is_whole else lost
        keepers = {stage.idx for stage in stages if stage.keeps_activations}
        plan = plan_replay(lost | self._unproven, keepers)
        self._unproven = plan.rebuilt
        self._gone_on |= new - plan.rebuilt
        return plan

    async def begin(
        self, stages: Sequence[RemoteStage], lengths: Sequence[int], plan: ReplayPlan
    ) -> StepLink:
        """Have every slot hold so many tokens, or none where it is rebuilt, and join stages up.

        Raises SessionError or StageLost naming the stage that is refused or lost.
        """
        epoch = os.urandom(16)
        for stage in stages:
            await stage.begin(self._opening(stage, epoch, lengths, plan))
            await stage.tell()
        return await self._join(stages, epoch, plan)

    async def replay(self, link: StepLink, source: ReplaySource, plan: ReplayPlan) -> None:
        """Send what stage 0 has lost, if it has; stages do as much for those behind them."""
        until = plan.sources.get(ORCHESTRATOR_IDX)
        if until is not None:
            for step in source.replay(until):
                await link.send(step)

    def _opening(
        self, stage: RemoteStage, epoch: bytes, lengths: Sequence[int], plan: ReplayPlan
    ) -> Init | Rewind:
        is_rebuilt = stage.idx in plan.rebuilt
        if is_rebuilt or not stage.has_begun:
            self._asked.pop(stage.idx, None)
        if not stage.has_begun:
            kept = None if is_rebuilt or not any(lengths) else self._kept.get(stage.idx)
            if kept is not None:
                self._asked[stage.idx] = kept
            return self._connector.init(stage.idx, epoch, kept, lengths)
        return Rewind(
            epoch=epoch,
            lengths=[0] * len(lengths) if is_rebuilt else list(lengths),
            data_out=self._connector.data_out(stage.idx),
            replay_until=plan.sources.get(stage.idx),
        )

    async def _join(
        self, stages: Sequence[RemoteStage], epoch: bytes, plan: ReplayPlan
    ) -> StepLink:
        """Open this epoch's data channels, and wait until every stage has its own."""
        gate = self._connector.new_gate()
        channels: dict[str, SecureChannel] = {}

        async def open_results() -> None:
            channels["out"] = await self._connector.results(self._listener, epoch, gate)

        try:
            async with open_tasks() as tasks:
                tasks.start_soon(open_results)
                channels["in"] = await self._connector.first(epoch)
            ready = []
            for stage in stages:
                what = f"stage {stage.idx}"
                self._connector.pending.setdefault(what, f"{what} is not ready")
                ready.append(told := await stage.ready())
                del self._connector.pending[what]
                self._hear_kept(stage.idx, told.kept)
                if stage.idx in plan.sources and not stage.keeps_activations:
                    # Its memory has been needed since it was asked; from now on that is known.
                    raise SessionError(f"{what} no longer keeps what it has sent")
        except BaseException:
            for channel in channels.values():
                await hang_up(channel)
            raise
        self.ready = tuple(ready)
        vocab_size = min(each.vocab_size for each in ready)
        self._connector.vocab_size = vocab_size
        channels["out"].wait_in_place(self._patience_ms)
        return StepLink(
            channels["in"],
            channels["out"],
            gate,
            len(stages),
            vocab_size,
            self._patience_ms,
            self._ends,
        )

    def _hear_kept(self, stage_idx: int, name: bytes | None) -> None:
        """Hear by which name a stage holds what it holds.

        Raises SessionError where what it was to go on from is gone; then it is rebuilt.
        """
        asked = self._asked.pop(stage_idx, None)
        self._kept.pop(stage_idx, None)
        if name is not None:
            self._kept[stage_idx] = name
        if asked is None:
            return
        if name != asked:
            self._unproven |= {stage_idx}
            raise SessionError(f"stage {stage_idx} begins anew: what it held is gone")
        logger.info("event=went_on stage=%d", stage_idx)
