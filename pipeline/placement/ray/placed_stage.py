"""What is known of one stage that somebody keeps on a node."""

import trio

from pipeline.agreement.addresses import StageEndpoint
from pipeline.placement.base import Progress
from pipeline.placement.ray.messages import Kept
from pipeline.worker_report import Loaded


class PlacedStage:
    """Where it is, and how far it has come, by its keeper's word."""

    def __init__(self, idx: int) -> None:
        self.idx = idx
        self.addresses: StageEndpoint | None = None
        # Set while it listens, as far as one knows.
        self.is_placed = trio.Event()
        self.has_listened = False
        self.problem: str | None = None
        self.progress: Progress | None = None
        self.lives = 0
        self._process: tuple[str, int, int] | None = None

    def take(self, kept: Kept) -> bool:
        """What its keeper says now; whether that is that it listens, as another than before."""
        self.problem = kept.problem
        process = None if kept.pid is None else (kept.node, kept.keeper_pid, kept.pid)
        if process is None or kept.addresses is None:
            self._leave()
        if process is None:
            self.progress = None
            return False
        is_new = process != self._process
        if is_new:
            self._process = process
            self.lives += 1
        self.progress = Progress(self.lives, kept.seconds, kept.loaded and Loaded(*kept.loaded))
        if kept.addresses is None or (self.is_placed.is_set() and not is_new):
            return False
        self.addresses = kept.addresses
        self.has_listened = True
        self.is_placed.set()
        return True

    def lose(self, reason: str | None) -> None:
        """Nobody keeps it now."""
        self.problem, self.progress = reason, None
        self._leave()

    def _leave(self) -> None:
        if self.is_placed.is_set():
            self.is_placed = trio.Event()
