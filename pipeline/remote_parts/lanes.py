"""Two halves of a batch taking turns: while one's question is away, the other is computed.

Each half runs through all layers in a lane, a thread with memory of its own. Whoever computes holds
the baton, so that no two ever do: kernels need not know of lanes. It is handed over where a lane
waits for an answer, and there only.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import TypeVar

T = TypeVar("T")


class Lanes:
    """Runs the parts of a step, overlapping what they wait for."""

    def __init__(self) -> None:
        self._baton = Lock()
        self._threads: ThreadPoolExecutor | None = None

    def __call__(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Do each; what they return, in order. Raises what the first to fail has raised."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(thread_name_prefix="lane")
        others = [self._threads.submit(self._work, work) for work in works[1:]]
        try:
            first = self._work(works[0])
        finally:
            # None may still compute in a session's memory when this is over.
            failures = [each.exception() for each in others]
        for failure in failures:
            if failure is not None:
                raise failure
        return [first, *(each.result() for each in others)]

    def away(self) -> AbstractContextManager[None]:
        """Let others compute meanwhile; for whoever waits in the midst of a work."""
        # a lone step has nobody to hand over to
        return self._handed_over() if self._baton.locked() else nullcontext()

    @contextmanager
    def _handed_over(self) -> Iterator[None]:
        self._baton.release()
        try:
            yield
        finally:
            self._baton.acquire()

    def _work(self, work: Callable[[], T]) -> T:
        with self._baton:
            return work()
