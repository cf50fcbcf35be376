"""Stopping and ending processes."""

import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def stopped(pid):
    """A process that does nothing in the body, where it may be killed or sent on its way."""
    os.kill(pid, signal.SIGSTOP)
    while state(pid) not in "TZ":
        time.sleep(0.001)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def state(pid):
    """A letter: R for running, S for asleep, T for stopped, Z for ended; see proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def end(process):
    """How a process that runs, or hangs, ends on SIGTERM."""
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        return process.wait(300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{process.args} did not end on SIGTERM") from None
