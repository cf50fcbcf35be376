"""Where the console commands begin: Ctrl-C ends them quietly even while they are being imported."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from transport.installed_version import tell_version


def _leave(number: int, frame: FrameType | None) -> None:
    del frame
    # Nothing is open yet. Raising inside a half-imported library prints its traceback, or is lost.
    os._exit(128 + number)


def leave_on_signals() -> None:
    """Have Ctrl-C and SIGTERM end this process quietly, until it takes care of them itself."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)


def settle_libraries() -> None:
    """Say what is wanted of libraries that read the environment while they are imported."""
    # numpy's BLAS would start a thread for each CPU, which spins until `kernels.runtime` stops it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # pydantic would search every distribution that is installed for code to run at each validation.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


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
    """Run `stage-worker`.

    `stage-worker door`, and those of one's own machines, are commands of their own, since a stage
    needs no word before its flags.
    """
    leave_on_signals()
    tell_version("stage-worker")
    settle_libraries()
    with importing():
        if sys.argv[1:2] == ["door"]:
            del sys.argv[1]
            from pipeline.cli.door_server import main
        elif sys.argv[1:2] in (["offer"], ["serve"], ["service"]):
            from pipeline.cli.machine import main
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
    leave_on_signals()
    tell_version("pipeline-orch")
    if "--supervise" in sys.argv[1:]:
        from pipeline.placement.fork_server import start_early

        start_early()
    if sys.argv[1:2] != ["shard"]:  # which multiplies whole matrices, and may use all CPUs for it
        settle_libraries()
    with importing():
        from pipeline.cli.pipeline_orch import main

    main()
