"""A bar on the terminal while something takes its time; nothing where nobody looks."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from pipeline.cli.logs import logs_json
from pipeline.progress import Progress, Watch


@contextmanager
def progress_bar(what: str, unit: str = "bytes") -> Iterator[Progress | None]:
    """Something to tell of how much is done, which shows it on stderr if that is a terminal."""
    if logs_json() or not _is_watched():
        yield None
        return
    # Only now: a worker that nobody watches would carry it for nothing.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    done = TextColumn(f"{{task.completed:.0f}}/{{task.total}} {unit}")
    amount = DownloadColumn() if unit == "bytes" else done
    columns = (TextColumn(what), BarColumn(), amount, TimeRemainingColumn())
    with Bars(
        *columns, console=console, transient=True, disable=not console.is_interactive
    ) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def progress_rows(names: Sequence[str]) -> Iterator[Callable[[int], Progress | None]]:
    """A bar for each of several things that go on at once, by index."""
    if logs_json() or not _is_watched():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    console = Console(stderr=True)
    with Bars(
        *columns, console=console, transient=True, disable=not console.is_interactive
    ) as bars:
        tasks = [bars.add_task(name, total=None) for name in names]
        yield (
            lambda index: lambda done, total: bars.update(tasks[index], completed=done, total=total)
        )


@contextmanager
def progress_bars() -> Iterator[Watch]:
    """One bar after another, each ended by the next: a terminal is shown only one."""
    with ExitStack() as current:

        def watch(what: str, unit: str) -> Progress | None:
            current.close()
            return current.enter_context(progress_bar(what, unit))

        yield watch


def _is_watched() -> bool:
    """Whether stderr is a terminal, and this process in front of it: others would draw over it."""
    try:
        return sys.stderr.isatty() and os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except OSError:  # not the terminal of this session
        return False
