"""Stages that a Ray cluster runs, as an orchestrator sees them."""

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping

import trio

from pipeline.agreement.addresses import StageEndpoint
from pipeline.errors import (
    InputError,
    ManifestError,
    MessageError,
    SessionError,
    StageHung,
    StageLost,
    StageMismatch,
    StageSilent,
)
from pipeline.placement.base import Progress
from pipeline.placement.notes import Notes
from pipeline.placement.ray.messages import (
    MAX_LINE_BYTES,
    Away,
    Cluster,
    Job,
    Kept,
    Lose,
    LossKind,
    Order,
    Report,
    Start,
    line_of,
    parse_news_untrusted,
)
from pipeline.placement.ray.placed_stage import PlacedStage
from pipeline.tasks import open_tasks

logger = logging.getLogger(__name__)

COMMAND = (
    *(sys.executable, "-P", "-c"),
    "from pipeline.placement.ray.engine_process import main; main()",
)
# What the process that speaks with Ray gets of this one's environment, beside all that is Ray's.
PASSED_ON = frozenset(
    {"HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR", "USER"}
)
# Before another is started where one has ended.
FIRST_PAUSE_SECONDS = 0.5
LAST_PAUSE_SECONDS = 8.0
# For all workers to end, wherever they are.
STOP_SECONDS = 20.0


class RayPlacement:
    """One keeper per stage, an actor of Ray's, which keeps a worker where Ray has put it.

    All that is heard from there is hearsay: a report moves the address at which a stage is looked
    for, and the progress that is shown, and nothing else.
    """

    def __init__(
        self, job: Job, tasks: trio.Nursery, on_change: Callable[[], None] = lambda: None
    ) -> None:
        """`tasks` keep the stages; cancelled, they end them. `on_change` hears of new addresses.

        They raise InputError where Ray cannot be used as it is asked for, or when a stage's first
        worker finds its input unusable.
        """
        self._job = job
        self._on_change = on_change
        self._stages = [PlacedStage(idx) for idx in range(len(job.arguments))]
        self._started: set[int] = set()
        self._orders: trio.MemorySendChannel[Order] | None = None
        self._notes = Notes()
        # Why the cluster does not answer, if it does not, and whether it ever has.
        self._problem: str | None = None
        self._has_answered = False
        tasks.start_soon(self._run)

    async def start(self, stage_idx: int) -> None:
        """Have the stage kept from now on; returns once it is known where it listens."""
        if stage_idx not in self._started:
            self._started.add(stage_idx)
            self._send(Start(stage_idx=stage_idx))
        await self._stages[stage_idx].is_placed.wait()

    def where(self, stage_idx: int) -> StageEndpoint:
        """Where it listens, or has last done so. Raises ManifestError before it ever has."""
        stages = self._stages
        own = stages[stage_idx].addresses
        if own is None:
            raise ManifestError(f"stage {stage_idx} has not been placed yet")
        after = stages[stage_idx + 1].addresses if stage_idx + 1 < len(stages) else None
        return own.model_copy(update={"data_out": after and after.data_in})

    @property
    def results_at(self) -> None:
        """Nowhere: no node need reach this machine."""
        return None

    def on_loss(self, error: SessionError) -> None:
        """Have its keeper hear of it, as a supervisor does."""
        if not isinstance(error, StageLost | StageMismatch) or error.stage_idx is None:
            return
        kind = _kind_of(error)
        if kind is not None:
            self._send(Lose(stage_idx=error.stage_idx, kind=kind))

    def progress(self, stage_idx: int) -> Progress | None:
        """What its worker has computed and read, by its keeper's word."""
        return self._stages[stage_idx].progress

    def problem(self, stage_idx: int) -> str | None:
        """Why it cannot be placed or started."""
        return self._stages[stage_idx].problem or self._problem

    def _send(self, order: Order) -> None:
        """Whatever cannot be sent now is not lost: a process that is started is told anew."""
        if self._orders is not None:
            self._orders.send_nowait(order)

    async def _run(self) -> None:
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            reason = await self._run_process()
            if self._problem is None:  # it has answered meanwhile
                pause_seconds = FIRST_PAUSE_SECONDS
            self._problem = reason
            self._notes.warn("event=placing_failed error=%s", reason)
            for stage in self._stages:
                stage.lose(None)
            await trio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LAST_PAUSE_SECONDS)

    async def _run_process(self) -> str:
        """Why it has ended."""
        process = await trio.lowlevel.open_process(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(os.environ),
        )
        send, receive = trio.open_memory_channel[Order](math.inf)
        self._orders = send
        for stage_idx in sorted(self._started):
            self._send(Start(stage_idx=stage_idx))
        try:
            async with open_tasks() as tasks:
                tasks.start_soon(self._order, process, receive)
                reason = await self._hear(process)
                tasks.cancel_scope.cancel()
        finally:
            self._orders = None
            await _end(process)
        return reason or f"what speaks with Ray has ended with status {process.returncode}"

    async def _order(self, process: trio.Process, orders: trio.MemoryReceiveChannel[Order]) -> None:
        assert process.stdin is not None  # asked for
        try:
            await process.stdin.send_all(line_of(self._job))
            async for order in orders:
                await process.stdin.send_all(line_of(order))
        except trio.BrokenResourceError:
            pass  # it has ended, which its stdout tells

    async def _hear(self, process: trio.Process) -> str | None:
        """What it says, to its end; its last word if it said why."""
        assert process.stdout is not None  # asked for
        unread = b""
        async for data in process.stdout:
            *lines, unread = (unread + data).split(b"\n")
            try:
                for line in lines:
                    self._take(line)
            except MessageError as error:
                return str(error)
            if len(unread) > MAX_LINE_BYTES:
                return "what speaks with Ray has sent a line of no end"
        return self._problem

    def _take(self, line: bytes) -> None:
        """Raises MessageError, and InputError where nothing will ever come of it."""
        match parse_news_untrusted(line):
            case Cluster(reason=reason, is_unusable=is_unusable):
                self._hear_of_cluster(reason, is_unusable=is_unusable)
            case Report(stage_idx=idx, kept=kept) if idx in self._started:
                self._hear_of_stage(self._stages[idx], kept)
            case Away(stage_idx=idx, reason=reason) if idx in self._started:
                self._stages[idx].lose(reason)
                self._notes.warn("event=stage_away stage=%d error=%s", idx, reason)
            case _:
                raise MessageError("what speaks with Ray speaks of a stage that there is not")

    def _hear_of_cluster(self, reason: str | None, *, is_unusable: bool) -> None:
        if reason is not None:
            reason = f"Ray at {self._job.address}: {reason}"
        if is_unusable and not self._has_answered:
            raise InputError(f"stages cannot be placed: {reason}")
        if reason is not None:
            self._notes.warn("event=cluster_away error=%s", reason)
        elif self._problem is not None:
            logger.info("event=cluster_back")
        self._has_answered |= reason is None
        self._problem = reason

    def _hear_of_stage(self, stage: PlacedStage, kept: Kept) -> None:
        if kept.is_unusable and not stage.has_listened:
            raise InputError(f"{kept.problem} (on node {kept.node})")
        before = stage.addresses
        is_new = stage.take(kept)
        if stage.addresses != before:
            self._on_change()
        if kept.problem is not None:
            self._notes.warn(
                "event=stage_away stage=%d node=%s error=%s", stage.idx, kept.node, kept.problem
            )
        if is_new:
            logger.info(
                "event=stage_placed stage=%d node=%s pid=%d keeper_pid=%d control=%s",
                stage.idx,
                kept.node,
                kept.pid or 0,
                kept.keeper_pid,
                kept.control and kept.control.addr,
            )


def _kind_of(error: StageLost | StageMismatch) -> LossKind | None:
    match error:
        case StageHung():
            return "hung"
        case StageSilent():
            return "silent"
        case StageMismatch():
            return "mismatch"
    return None


def _environment(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Nothing that this process was told in confidence; and Ray's token is always shown.

    Attack: where a cluster asks for none, whoever reaches a node runs what he likes beside its key.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name in PASSED_ON or name.startswith("RAY_")
    }
    return {**kept, "RAY_AUTH_MODE": "token"}


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        assert process.stdin is not None  # both asked for
        assert process.stdout is not None
        await process.stdin.aclose()
        with trio.move_on_after(STOP_SECONDS):
            async for _ in process.stdout:  # what it still says would else keep it waiting
                pass
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        await process.stdout.aclose()
