"""Signals and the end of stdin: what makes a command leave in order."""

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType

import trio

from pipeline.tasks import first_leaf


@contextmanager
def termination_unwinds() -> Iterator[None]:
    """SIGTERM and SIGINT raise meanwhile, so that half-written files and directories go away."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        sys.exit(128 + number)

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, leave),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def wait_for_end_of_stdin() -> None:
    """Return when whoever holds the other end of stdin is gone.

    A supervisor that is killed outright cannot end its workers itself. (The kernel's parent-death
    signal follows the thread that started a process, not the process, and fires too early.)
    """
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
        async for _ in stdin:
            pass


def run_until_signalled(
    main: Callable[[], Awaitable[None]],
    leave: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    signals: Collection[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
) -> int | None:
    """Run `main` under trio; either of `signals` cancels it, once `leave` has had its time.

    A second signal cancels both. Returns the first one's number, if any. Raises what `main` raises,
    itself and not in a group.
    """
    received: int | None = None

    async def supervise() -> None:
        nonlocal received
        with trio.open_signal_receiver(*signals) as caught:
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    nonlocal received
                    async for number in caught:
                        if received is not None:
                            break
                        received = number
                        nursery.start_soon(leave_and_cancel)
                    nursery.cancel_scope.cancel()

                async def leave_and_cancel() -> None:
                    await leave()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(wait)
                await main()
                nursery.cancel_scope.cancel()

    try:
        trio.run(supervise)
    except BaseExceptionGroup as group:
        # A signal often goes to the whole process group: peers that end are not the news then.
        if received is None:
            raise first_leaf(group) from None
    return received
