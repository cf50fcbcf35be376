"""Where the console commands begin: Ctrl-C ends them quietly even while they are being imported."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    del frame
    # Nothing is open yet. Raising inside a half-imported library prints its traceback, or is lost.
    os._exit(128 + number)


def _leave_on_signals() -> None:
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)


@contextmanager
def importing() -> Iterator[None]:
    """Import without collecting garbage: there is none, and looking for it takes a seventh longer.

    What was imported stays, so later collections need not look at it either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def stage_worker() -> None:
    """Run `stage-worker`; with `--standby` alone, as soon as stdin says with what arguments.

    `stage-worker door` and the like are commands of their own, since a stage needs no word before
    its flags.
    """
    _leave_on_signals()
    with importing():
        if sys.argv[1:] == ["--standby"]:
            from pipeline.cli.standby import stand_by

            stand_by()
        if sys.argv[1:2] == ["door"]:
            del sys.argv[1]
            from pipeline.cli.door_server import main
        elif sys.argv[1:2] == ["attention"]:
            del sys.argv[1]
            from pipeline.cli.part_worker import main
        elif sys.argv[1:2] == ["linear"]:
            del sys.argv[1]
            from pipeline.cli.linear_worker import main
        else:
            from pipeline.cli.stage_worker import main

    main()


def pipeline_orch() -> None:
    """Run `pipeline-orch`."""
    _leave_on_signals()
    with importing():
        from pipeline.cli.pipeline_orch import main

    main()
