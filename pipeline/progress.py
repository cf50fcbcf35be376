"""How far a long piece of work has come, for whoever watches."""

from collections.abc import Callable
from typing import Protocol

# Called with the bytes, or pieces, that are done and with all there are; often, so it returns at
# once.
Progress = Callable[[int, int], None]


class Watch(Protocol):
    """Whoever watches several pieces of work, one after the other."""

    def __call__(self, what: str, unit: str) -> Progress | None:
        """Told what begins: something to tell how far it is, if anybody wants to know."""


class Meter:
    """Counts bytes of one piece of work, and tells each step on."""

    def __init__(self, num_bytes: int, progress: Progress | None) -> None:
        self._num_bytes = num_bytes
        self._progress = progress
        self._num_done = 0

    def add(self, num_bytes: int) -> None:
        """So many more are done."""
        self._num_done += num_bytes
        if self._progress is not None:
            self._progress(self._num_done, self._num_bytes)


def part_of(progress: Progress | None, index: int, count: int) -> Progress | None:
    """The progress of the index-th of `count` parts, about as large as each other."""
    if progress is None:
        return None
    whole = progress
    return lambda done, total: whole(index * total + done, count * total)
