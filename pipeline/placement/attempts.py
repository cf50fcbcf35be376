"""Attempts to have a worker that lasts: how soon the next is made, and how much is said of them."""

import logging
import math
import random

import trio

logger = logging.getLogger(__name__)

# A worker that dies soon is tried again at growing intervals; one that has lived, at once.
FIRST_BACKOFF_SECONDS = 0.1
# What kept it from starting may be mended at any time: it is to be back soon after.
MAX_BACKOFF_SECONDS = 8.0
PROBATION_SECONDS = 5.0
# Between two lines about workers that listen and soon die, one after the other.
REMINDER_SECONDS = 60.0


class Attempts:
    """Of one stage; a machine's stages that fail together are tried a little apart."""

    def __init__(self, stage_idx: int) -> None:
        self._stage_idx = stage_idx
        # Why it cannot be started, if it cannot.
        self.problem: str | None = None
        self._pid = 0
        self._listening_since: float | None = None
        self._is_explained = False
        self._num_failed = 0
        self._backoff = FIRST_BACKOFF_SECONDS
        self._quiet_until = -math.inf

    def started(self, pid: int) -> None:
        """Another process has been started."""
        self._pid = pid
        self._listening_since = None
        # Workers that start may be killed in a row by somebody; those that cannot do not matter.
        num_told = 1 if self.problem else 3
        level = logging.INFO if self._num_failed <= num_told else logging.DEBUG
        logger.log(level, "event=worker_started stage=%d pid=%d", self._stage_idx, pid)

    def listening(self) -> None:
        """It takes connections, which is news where those before it did not."""
        self._listening_since = trio.current_time()
        if self.problem is not None:
            logger.info("event=worker_back stage=%d pid=%d", self._stage_idx, self._pid)
        self.problem = None
        self._is_explained = False

    def died(self, code: int, reason: str | None) -> float:
        """It has; how many seconds to wait before the next."""
        since = self._listening_since
        if since is not None and trio.current_time() - since > PROBATION_SECONDS:
            self._num_failed, self._backoff = 0, FIRST_BACKOFF_SECONDS
            self._quiet_until = -math.inf
            self._tell(code, reason)
            return 0.0
        self._num_failed += 1
        if since is None:
            self._note_problem(code, reason)
        elif (now := trio.current_time()) >= self._quiet_until:
            self._quiet_until = now + REMINDER_SECONDS
            self._tell(code, reason)
        seconds, self._backoff = self._backoff, min(2 * self._backoff, MAX_BACKOFF_SECONDS)
        return seconds * random.uniform(0.75, 1.0)  # noqa: S311  (nothing secret)

    def _note_problem(self, code: int, reason: str | None) -> None:
        """Told once: whoever waits for the stage repeats it."""
        if self.problem is None or (reason is not None and not self._is_explained):
            self._tell(code, reason)
        self._is_explained |= reason is not None
        # One that was killed while it loaded says nothing of the next.
        is_chronic = self._num_failed > 1
        self.problem = reason or (f"it ended with status {code}" if is_chronic else None)

    def _tell(self, code: int, reason: str | None) -> None:
        logger.warning("event=worker_died stage=%d code=%d error=%s", self._stage_idx, code, reason)
