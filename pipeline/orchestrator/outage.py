"""Outliving stages: a pipeline that cannot be mended in time is awaited, not given up."""

import logging
import math
import random
from collections.abc import Callable
from typing import Protocol

import trio

from pipeline.errors import SessionError, SessionRefused, StageMismatch
from pipeline.orchestrator.epochs import ReplaySource
from pipeline.orchestrator.failover import Work, run_with_failover
from pipeline.orchestrator.remote_pipeline import Pipeline

logger = logging.getLogger(__name__)

# Between attempts while a stage is away: one that has come back is met within the last of these.
FIRST_PAUSE_SECONDS = 0.5
LAST_PAUSE_SECONDS = 8.0
# Between two lines about an outage that lasts.
REMINDER_SECONDS = 60.0


class Watcher(Protocol):
    """Whoever serves requests from a pipeline that comes and goes."""

    def made(self, pipeline: Pipeline) -> None:
        """Hear of the pipeline before it is connected."""

    def away(self, error: SessionError) -> None:
        """It could not be mended in time; until it stands nobody should wait for it."""


async def outlast(
    pipeline: Pipeline,
    work: Work,
    source: ReplaySource,
    patience_seconds: float,
    on_away: Callable[[SessionError], None],
) -> None:
    """As `run_with_failover`, but what it would give up is tried on and on; `on_away` hears of it.

    Raises SessionRefused or StageMismatch where a stage cannot take part before the pipeline has
    ever stood: what is set up wrongly is not mended by waiting. Later it may be, by whoever is just
    updating that stage.
    """
    has_stood = False
    outage = _Outage()

    async def note_and_work(pipeline: Pipeline) -> None:
        nonlocal has_stood, outage
        has_stood = True
        outage.tell_end()
        outage = _Outage()
        await work(pipeline)

    while True:
        try:
            return await run_with_failover(
                pipeline, note_and_work, source, patience_seconds, outage.told
            )
        except SessionError as error:
            if isinstance(error, SessionRefused | StageMismatch) and not has_stood:
                raise
            outage.note(error)
            on_away(error)
        await trio.sleep(outage.pause_seconds())


class _Outage:
    """What is said of a pipeline that is away, and how soon it is tried again."""

    def __init__(self) -> None:
        # Why it cannot be connected: each reason is said once, however often it is found.
        self.told: set[str] = set()
        self._since: float | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._quiet_until = -math.inf

    def note(self, error: SessionError) -> None:
        """It is away, or still is: a line at first, one a minute, and one for each new refusal."""
        now = trio.current_time()
        self._since = now if self._since is None else self._since
        is_news = isinstance(error, SessionRefused) and str(error) not in self.told
        self.told.add(str(error))
        if now >= self._quiet_until or is_news:
            self._quiet_until = now + REMINDER_SECONDS
            away_seconds = now - self._since
            logger.error("event=pipeline_away for_seconds=%.0f error=%s", away_seconds, error)

    def tell_end(self) -> None:
        """It stands again, if it has been away."""
        if self._since is not None:
            away_seconds = trio.current_time() - self._since
            logger.warning("event=pipeline_back after_seconds=%.1f", away_seconds)

    def pause_seconds(self) -> float:
        """Each about twice the one before; a little apart from those of other servers."""
        seconds = self._pause_seconds
        self._pause_seconds = min(2 * seconds, LAST_PAUSE_SECONDS)
        return seconds * random.uniform(0.75, 1.0)  # noqa: S311  (nothing secret)
