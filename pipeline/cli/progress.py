"""A bar on the terminal while weights are read, hashed or cut; nothing where nobody looks."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipeline.cli.logs import logs_json
from pipeline.progress import Progress, Watch


@contextmanager
def progress_bar(what: str, *, counts_bytes: bool = True) -> Iterator[Progress | None]:
    """Something to tell how much is done, which shows it on stderr if that is a terminal."""
    if logs_json() or not _is_watched():
        yield None
        return
    # Only now: a worker that nobody watches would carry it for nothing.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    done = DownloadColumn() if counts_bytes else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), done, TimeRemainingColumn())
    with Bars(
        *columns, console=console, transient=True, disable=not console.is_interactive
    ) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def progress_bars() -> Iterator[Watch]:
    """One bar after another, each ended by the next: a terminal is shown only one."""
    with ExitStack() as current:

        def watch(what: str, *, counts_bytes: bool = False) -> Progress | None:
            current.close()
            return current.enter_context(progress_bar(what, counts_bytes=counts_bytes))

        yield watch


def _is_watched() -> bool:
    """Whether stderr is a terminal, and this process in front of it: others would draw over it."""
    try:
        return sys.stderr.isatty() and os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except OSError:  # not the terminal of this session
        return False
