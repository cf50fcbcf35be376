"""A request's own time: when it is over, that request ends, and nothing else."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from pipeline.errors import RequestTimedOut


@contextmanager
def request_time(
    seconds: float | None, began: float | None = None
) -> Iterator[Callable[[float], None]]:
    """Cancel the body so many seconds after the request began, by trio's clock; None: never.

    Without `began`, that is what the yielded function is first told. Raises RequestTimedOut.
    """
    with trio.CancelScope() as scope:

        def begin(now: float) -> None:
            if seconds is not None and scope.deadline == math.inf:
                scope.deadline = now + seconds

        if began is not None:
            begin(began)
        yield begin
    if scope.cancelled_caught:
        assert seconds is not None  # nothing else cancels it
        raise RequestTimedOut(seconds)
