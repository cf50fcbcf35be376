"""How long to wait for stages: as long as they come nearer, and then for so long."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping

import trio

from pipeline.placement.base import Progress
from pipeline.tasks import open_tasks

# Between looks at how far stages have come, where patience is longer.
LOOK_SECONDS = 1.0
# A stage that loads computes, hashing if nothing else; one that is stuck may still wake up.
MIN_SHARE = 0.001
# One that dies whenever it has loaded, for want of memory, say, would be waited for for ever.
MAX_LIVES = 3


class Patience:
    """A deadline that does not come nearer while stages load.

    What a model takes to load, only its machine knows; that nothing happens, anybody can see.
    """

    def __init__(self, seconds: float, progress: Callable[[], Mapping[int, Progress]]) -> None:
        """`progress` tells how far every stage has come that is awaited and can be watched."""
        self._seconds = seconds
        self._progress = progress
        self._last: dict[int, Progress] = {}
        self._lives: defaultdict[int, set[int]] = defaultdict(set)

    async def run(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Do `work`, or stop it once nothing has moved for so long; whether it was done."""
        is_done = False
        async with open_tasks() as tasks:
            tasks.cancel_scope.deadline = trio.current_time() + self._seconds
            tasks.start_soon(self._extend, tasks.cancel_scope)
            await work()
            is_done = True
            tasks.cancel_scope.cancel()
        return is_done

    async def _extend(self, scope: trio.CancelScope) -> None:
        pause_seconds = min(LOOK_SECONDS, self._seconds / 4)
        while True:
            await trio.sleep(pause_seconds)
            moved = [self._has_moved(*item, pause_seconds) for item in self._progress().items()]
            if any(moved):
                scope.deadline = trio.current_time() + self._seconds

    def _has_moved(self, stage_idx: int, now: Progress, elapsed: float) -> bool:
        last, self._last[stage_idx] = self._last.get(stage_idx), now
        self._lives[stage_idx].add(now.life)
        if len(self._lives[stage_idx]) > MAX_LIVES:
            return False
        if last is None or last.life != now.life:
            return True
        return now.seconds - last.seconds > MIN_SHARE * elapsed
