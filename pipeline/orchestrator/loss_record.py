"""What has been lost of a pipeline, what ends because of it, and how long it took to make good."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from pipeline.errors import LinkLost, SessionError

logger = logging.getLogger(__name__)

# When a data channel breaks, the control channel of the stage that died ends at the same moment;
# its neighbours' complaints may only be quicker.
BLAME_SECONDS = 1.0


class Losses:
    """The loss that counts, and whose work it ends."""

    def __init__(self) -> None:
        # Nothing is lost that has never stood.
        self.has_stood = False
        self.num_failovers = 0
        self.recovery_seconds = 0.0
        self._failure: SessionError | None = None
        self._scope = trio.CancelScope()
        self._lost_at: float | None = None

    @property
    def is_broken(self) -> bool:
        """Whether something has been lost since `forget`."""
        return self._failure is not None

    @property
    def is_recovering(self) -> bool:
        """Whether a loss has not been made good yet."""
        return self._lost_at is not None

    def forget(self) -> None:
        """What was lost is being replaced; from here on only what is lost anew counts."""
        self._failure = None

    def fail(self, error: SessionError) -> None:
        """Note a loss, and end what is being done. A stage's loss explains more than a link's."""
        if self._failure is None or isinstance(self._failure, LinkLost):
            self._failure = error
        if self.has_stood and self._lost_at is None:
            self._lost_at = trio.current_time()
        self._scope.cancel()

    @asynccontextmanager
    async def unbroken(self) -> AsyncIterator[None]:
        """The body is cancelled by a loss, which is raised in its place: a SessionError."""
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

    def note_recovery(self) -> None:
        """Results come again, or the stages wait for something to do."""
        if self._lost_at is None:
            return
        self.recovery_seconds = trio.current_time() - self._lost_at
        self._lost_at = None
        self.num_failovers += 1
        logger.warning("event=failover_complete seconds=%.3f", self.recovery_seconds)
