"""Computes the steps of many sessions: those that wait together run as one.

Computing is done in place, as in a stage. Meanwhile requests arrive; when it is done, all that have
come in whole are the next step.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import trio

from pipeline.codecs.plain import Plain
from pipeline.doors.messages import DoorError, DoorFault
from pipeline.dtypes import Floats
from pipeline.models.registry import ModelShard
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Result, Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits
from pipeline.stage.step_executor import StageCore
from transport.tensor_frames import DType, Tensor

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Work:
    """Rows [tokens, hidden] to compute at a segment, of which the last `num_rows` come back.

    `on_done` gets these, [num_rows, hidden], the moment they are there.
    """

    segment: Segment
    rows: Floats
    num_rows: int
    on_done: Callable[[Floats], None]
    error: Exception | None = None
    finished: trio.Event = field(default_factory=trio.Event)


class StepBatcher:
    """All layers of a model and a slot for each session."""

    def __init__(
        self, shard: ModelShard, num_slots: int, max_seq_len: int, max_step_tokens: int
    ) -> None:
        """Rows come decoded, each session's by itself: what one sends wrong harms no other."""
        self._codec = Plain(DType.F32, shard.config.hidden_dim)
        limits = SessionLimits(
            num_slots, max_seq_len, max_step_tokens, self._codec, has_client_ends=True
        )
        self.core = StageCore(shard, limits)
        self._waiting: list[Work] = []
        self._has_work = trio.Event()
        self._numbers = count()
        self.no_rows = np.empty((0, shard.config.hidden_dim), np.float32)

    async def run(self, work: Work) -> None:
        """Compute a step, each slot's one after another. Raises DoorError where that fails.

        Cancelled before it has begun it leaves no trace; once it is done `on_done` has been called.
        """
        self._waiting.append(work)
        self._has_work.set()
        try:
            await work.finished.wait()
        finally:
            if work in self._waiting:
                self._waiting.remove(work)
        if work.error is not None:
            detail = "the step cannot be computed"
            raise DoorError(DoorFault.UNAVAILABLE, detail) from work.error

    async def serve(self) -> None:
        """Compute what waits, until cancelled."""
        while True:
            await self._has_work.wait()
            await trio.lowlevel.checkpoint()  # whoever is ready to ask joins this step
            if batch := self._take():
                self._compute(batch)
            if not self._waiting:
                self._has_work = trio.Event()

    def _take(self) -> list[Work]:
        """Those that have waited longest, as many as one step may hold."""
        batch: list[Work] = []
        room = self.core.limits.max_step_tokens
        for work in self._waiting:
            room -= work.segment.num_tokens
            if room < 0:
                break
            batch.append(work)
        del self._waiting[: len(batch)]
        return batch

    def _compute(self, batch: list[Work]) -> None:
        try:
            for work, rows in zip(batch, self._results(batch), strict=True):
                work.on_done(rows)
        except Exception as error:
            # A defect here must not cost others the door. The type alone: the text of an unexpected
            # error may hold anything.
            name, is_verbose = type(error).__name__, logger.isEnabledFor(logging.DEBUG)
            logger.error("event=door_step_failed type=%s", name, exc_info=is_verbose)
            for work in batch:
                work.error = error
        for work in batch:
            work.finished.set()

    def _results(self, batch: list[Work]) -> list[Floats]:
        segments = tuple(work.segment for work in batch)
        wants = tuple(
            Want(Result.HIDDEN, work.num_rows) if work.num_rows else Want.NOTHING for work in batch
        )
        rows = np.ascontiguousarray(np.concatenate([work.rows for work in batch]))
        header = StepHeader(StepKind.STEP, next(self._numbers), segments, wants)
        inputs = Tensor(self._codec.specs(len(rows))[0], rows.data.cast("B"))
        tensors = self.core.step(header, (inputs,))
        found = self.no_rows
        if len(tensors) > 1:  # behind the tokens, of which there are none
            found = np.frombuffer(tensors[1].data, "<f4").reshape(tensors[1].spec.shape)
        ends = np.cumsum([work.num_rows for work in batch])
        return np.split(found, ends[:-1])
