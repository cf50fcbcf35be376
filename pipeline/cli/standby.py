"""A worker that is not one yet: everything imported, waiting to be told which stage to serve."""

import json
import os
import sys
import threading
from contextlib import suppress

# Importing must not slow the stages that work; a thread has a priority of its own, so what it has
# imported later runs at the process's.
IMPORT_NICENESS = 10
READY = b"ready\n"


def stand_by() -> None:
    """Import what a worker needs, say so on stdout, and take its arguments from a line of stdin.

    Ends the process when stdin does: whoever held it is gone.
    """
    importing = threading.Thread(target=_import)
    importing.start()
    importing.join()
    with suppress(BrokenPipeError):  # nobody is there any more: stdin has ended as well
        os.write(sys.stdout.fileno(), READY)
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(sys.stdin.fileno(), 1 << 16)
        if not data:
            sys.exit(0)
        line += data
    sys.argv[1:] = json.loads(line)


def _import() -> None:
    with suppress(OSError):  # a priority below that of the machine's policy is not vital
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), IMPORT_NICENESS)
    import pipeline.cli.stage_worker  # noqa: F401
    from pipeline.kernels.kernel_selection import import_kernels

    import_kernels()
