"""Telling systemd how a service is: ready, alive, about to stop. Source: sd_notify(3)."""

import logging
import math
import os
import re
import socket
from collections.abc import Callable, Mapping

import trio

logger = logging.getLogger(__name__)

# Between looks at whether a service has become ready.
LOOK_SECONDS = 0.5


class ServiceManager:
    """Whoever started this process, if it listens at NOTIFY_SOCKET; else nobody hears of it."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte that abstract names begin with.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._watchdog_seconds = _watchdog_seconds(environment)

    def tell(self, assignment: str) -> bool:
        """Send an assignment, such as READY=1; whether it has been taken.

        Never waits: a manager that is busy must not keep requests waiting.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.connect(self._address)
                sock.send(assignment.encode())
            except OSError as error:
                logger.debug("event=notify_failed error=%s", error.strerror)
                return False
        return True

    async def keep_informed(self, is_ready: Callable[[], bool]) -> None:
        """Say when it is ready, and feed the watchdog, if there is one, until cancelled.

        The watchdog bites when this event loop turns no more.
        """
        if not self._address:
            return
        has_told = False
        pause_seconds = min(self._watchdog_seconds / 2, LOOK_SECONDS)
        while not has_told or self._watchdog_seconds < math.inf:
            if not has_told and is_ready():
                has_told = self.tell("READY=1")
            if self._watchdog_seconds < math.inf:
                self.tell("WATCHDOG=1")
            await trio.sleep(pause_seconds)

    def stopping(self) -> None:
        """It ends, and has to be waited for."""
        if self._address:
            self.tell("STOPPING=1")


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    """How often it wants to hear of this process; infinity where it does not."""
    text, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    # None, as systemd has it: 0, what is no number, and beyond 64 bits.
    microseconds = int(text) if re.fullmatch("[0-9]{1,20}", text) else 0
    if not 0 < microseconds < 1 << 64 or (pid and pid != str(os.getpid())):
        return math.inf
    return microseconds / 1e6
