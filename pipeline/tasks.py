"""A nursery whose failures come out one at a time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_tasks() -> AsyncIterator[trio.Nursery]:
    """A trio nursery that raises its first failure itself, not a group around it.

    Tasks of one session fail together when a peer dies; only one of the reasons is the cause,
    and a user reads one line.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        failure = first_leaf(group)
    # Raised out here, and not kept, the failure neither refers to its group nor to itself: such
    # a cycle would keep all that its frames hold alive.
    try:
        if failure is not None:
            raise failure
    finally:
        del failure


def first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception of a group that is not a cancellation, else the first."""
    leaves = list(_leaves(group))
    for leaf in leaves:
        if not isinstance(leaf, trio.Cancelled):
            return leaf
    return leaves[0]


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]
