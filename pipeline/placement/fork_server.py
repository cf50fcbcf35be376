"""The process that workers are forks of: it has imported what they need, and knows nothing else.

A fork is a worker within milliseconds, where a new interpreter would import for half a second. The
process is a program of its own, started beside the orchestrator and not forked from it: no prompt,
key or activation has ever been in its memory. It has one thread, and runs no loop of events.

It takes requests from a socket, its stdin: a line, which is a worker's arguments, and with it
descriptors: the worker's stdin and stdout, where its process id and then the status that it ends
with are told, a line each, and what else is handed to it: an argument for each is its number on one
side, and becomes that on the other. It ends when nobody can make requests
any more, and its forks with it.
"""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple, NoReturn

# -P: else a module beside a downloaded model, in the directory the user is in, would be run.
COMMAND = (sys.executable, "-P", "-c", "from pipeline.cli.worker_forks import main; main()")
# What Ctrl-C sends to every process of a terminal, and service managers to all of a service: the
# orchestrator says when its workers leave, and this process tells it of their ends.
BLOCKED = (signal.SIGINT, signal.SIGTERM)
# Once nobody can make requests, for forks to end as they do at the end of their stdin.
LEAVE_SECONDS = 5
MAX_DESCRIPTORS = 64
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class ForkServer(NamedTuple):
    """A process that forks, as the one that started it has it."""

    process: subprocess.Popen[bytes]
    requests: socket.socket


_early: ForkServer | None = None


def start_early() -> None:
    """Start one for whoever asks first: it imports while this process does, on another core."""
    global _early  # noqa: PLW0603 - as global as a process's children
    with suppress(OSError):  # whoever asks for one tries again, and says so
        _early = _start()


def started() -> ForkServer:
    """One that nobody else has. Raises OSError."""
    global _early
    found, _early = _early, None
    return _start() if found is None else found


def _start() -> ForkServer:
    ours, theirs = socket.socketpair()
    with ExitStack() as undo, theirs:
        undo.callback(ours.close)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # which it inherits
        try:
            process = subprocess.Popen(  # noqa: S603 - no shell, and none of its words is given
                COMMAND, stdin=theirs.fileno(), stdout=subprocess.DEVNULL
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        undo.pop_all()
    return ForkServer(process, ours)


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, where the system does that.

    One that hangs or imports does not see the end of its stdin.
    """
    _set_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before that
        os._exit(0)


def fork_for_requests() -> list[str]:
    """Serve as that process, all imported; returns in the forks alone, each with its arguments."""
    _set_death_signal(0)  # forks are given their time
    with socket.socket(fileno=os.dup(0)) as requests, open(os.devnull) as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
        return _Forks(requests).serve()


class _Forks:
    """Those of this process, by the descriptor on which each one's end is told."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._running: dict[int, int] = {}
        self._ended: dict[int, int] = {}
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake)

    def serve(self) -> list[str]:
        """Returns in the forks."""
        poll = select.poll()
        poll.register(self._requests, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._woken:
                    os.read(fd, 1 << 10)
                    for status in self._tell_ends():
                        poll.register(status, 0)  # for when nobody listens there any more
                elif fd in self._ended:
                    poll.unregister(fd)
                    self._forget(fd)
                elif (found := _receive(self._requests)) is None:
                    self._leave()
                elif (arguments := self._fork(*found)) is not None:
                    return arguments

    def _fork(self, arguments: list[str | int], descriptors: Sequence[int]) -> list[str] | None:
        """None in this process."""
        stdin, stdout, status, *handed = descriptors
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            _tell(status, f"failed {error.strerror}")
            _close(*descriptors)
            return None
        if pid:
            _tell(status, str(pid))
            _close(stdin, stdout, *handed)
            self._running[status] = pid
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_with(parent)
        _close(self._woken, self._wake, *self._running, *self._ended)
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        _close(stdin, stdout, status)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
        numbers = iter(handed)
        return [str(next(numbers)) if isinstance(each, int) else each for each in arguments]

    def _tell_ends(self) -> Iterator[int]:
        """Where the ends that have come have been told.

        What has ended keeps its process id until nobody can know it as running: else somebody
        could kill another process that has got it since.
        """
        for status, pid in list(self._running.items()):
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                is_exit = found.si_code == os.CLD_EXITED
                _tell(status, str(found.si_status if is_exit else -found.si_status))
                self._ended[status] = self._running.pop(status)
                yield status

    def _forget(self, status: int) -> None:
        os.close(status)
        os.waitpid(self._ended.pop(status), 0)

    def _leave(self) -> NoReturn:
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.alarm(LEAVE_SECONDS)
        with suppress(ChildProcessError):
            while True:
                os.wait()
        os._exit(0)


def _receive(requests: socket.socket) -> tuple[list[str | int], list[int]] | None:
    """A request; None when there can be no more."""
    line, descriptors = b"", []
    while not line.endswith(b"\n"):
        data, found, _, _ = socket.recv_fds(requests, 1 << 16, MAX_DESCRIPTORS)
        descriptors += found
        line += data
        if not data:
            _close(*descriptors)
            return None
    return json.loads(line), descriptors


def _set_death_signal(number: int) -> None:
    """Of the end of the thread that started this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _tell(status: int, line: str) -> None:
    with suppress(OSError):  # nobody listens any more
        os.write(status, line.encode() + b"\n")


def _close(*descriptors: int) -> None:
    for fd in descriptors:
        os.close(fd)
