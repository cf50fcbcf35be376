"""One of the pipelines behind a server: it connects, is mended where it breaks, and is renewed."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NoReturn

import trio

from pipeline.cli.pipeline_access import PipelineAccess
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.engine_stats import EngineStats
from pipeline.errors import PipelineError, SessionError
from pipeline.gateway.readiness import Phase
from pipeline.orchestrator.failover import Work
from pipeline.orchestrator.outage import LAST_PAUSE_SECONDS
from pipeline.orchestrator.remote_pipeline import Pipeline
from pipeline.orchestrator.stage_watch import RemoteStage
from pipeline.tasks import open_tasks

logger = logging.getLogger(__name__)


class Replica:
    """An engine, and the pipeline that it runs on, which comes and goes."""

    def __init__(self, idx: int, engine: PipelineEngine) -> None:
        self.idx = idx
        self.engine = engine
        self.pipeline: Pipeline | None = None
        # Hears when it has come, or gone.
        self.on_change: Callable[[], None] = lambda: None
        self._phase = Phase.STARTING
        self._is_drained = False
        self._has_stood = trio.Event()
        self._num_renewed = 0
        self._life = trio.CancelScope()

    @property
    def phase(self) -> Phase:
        """How far it is from computing a token."""
        if self._phase is not Phase.READY:
            return self._phase
        if self._is_drained:
            return Phase.DRAINING
        is_joined = self.pipeline is not None and self.pipeline.is_joined
        return Phase.READY if is_joined else Phase.RECOVERING

    @property
    def is_open(self) -> bool:
        """Whether it stands, or is being mended, and may be given requests."""
        return self._phase is Phase.READY and not self._is_drained

    @property
    def takes_requests(self) -> bool:
        """Whether it would serve one at once."""
        return self.phase is Phase.READY

    @property
    def stats(self) -> EngineStats:
        """Its engine's counters."""
        return self.engine.stats

    @property
    def max_seq_len(self) -> int:
        """Tokens that a request may have of it."""
        return self.engine.max_seq_len

    @property
    def stages(self) -> Sequence[RemoteStage]:
        """Those that are there."""
        return () if self.pipeline is None else self.pipeline.stages

    def made(self, pipeline: Pipeline) -> None:
        """Hear of the pipeline before it is connected."""
        self.pipeline = pipeline

    def open(self) -> None:
        """It stands, for the first time or again."""
        self._phase = Phase.READY
        self._has_stood.set()
        self.on_change()

    def away(self, error: SessionError) -> None:
        """It could not be mended in time: whoever waits for it is told so."""
        self._phase = Phase.AWAY
        self.on_change()
        self.engine.drop_all(error)

    async def run(self, access: PipelineAccess, work: Work, *, outlasts: bool) -> NoReturn:
        """Do `work` on it as `PipelineAccess.run`, and anew with other stages when it is renewed.

        Raises what that does, unless it is of new stages that have never stood: there was a
        pipeline before them, and it is not for them to end the server.
        """
        while True:
            try:
                with trio.CancelScope() as self._life:
                    await access.run(work, self.engine.scheduler, self, outlasts=outlasts)
            except PipelineError as error:
                if not self._num_renewed or self._has_stood.is_set():
                    raise
                logger.error("event=replica_not_renewed replica=%d error=%s", self.idx, error)
                self.away(SessionError(str(error)))
                await trio.sleep(LAST_PAUSE_SECONDS)

    async def renew(self, wait_idle: Callable[[], Awaitable[None]]) -> None:
        """Replace all stages once nobody needs them; returns when the new ones stand."""
        logger.info("event=replica_draining replica=%d", self.idx)
        self._is_drained = True
        self.on_change()
        try:
            await wait_idle()
            logger.info("event=replica_drained replica=%d", self.idx)
            self._phase, self._has_stood = Phase.STARTING, trio.Event()
            self.pipeline = None
            self._num_renewed += 1
            self._life.cancel()
            await self._has_stood.wait()
        finally:
            self._is_drained = False
            self.on_change()
        logger.info("event=replica_renewed replica=%d", self.idx)


async def run_all(
    replicas: Sequence[Replica],
    accesses: Sequence[PipelineAccess],
    work: Callable[[Replica, Pipeline], Awaitable[None]],
    *,
    outlasts: bool,
) -> None:
    """`Replica.run` of each, side by side. Raises what the first of them does that ends."""
    async with open_tasks() as tasks:
        for replica, access in zip(replicas, accesses, strict=True):
            own = partial(work, replica)
            tasks.start_soon(partial(replica.run, access, own, outlasts=outlasts))
