"""Workers as forks of a process that has imported what they need (`placement.fork_server`)."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import trio

from pipeline.placement.fork_server import LEAVE_SECONDS, ForkServer, started


class NotForked(Exception):
    """There is no worker; `code` and `reason` are as if one had ended at once."""

    def __init__(self, code: int, reason: str | None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class ForkedWorker:
    """A fork, which its server waits for: what `trio.Process` is of a child."""

    def __init__(self, stdin: int, stdout: int, status: int) -> None:
        """What is held open of its stdin, and read of its stdout and of its status."""
        self.pid = 0
        self.returncode: int | None = None
        # Whether it is certain that it has ended.
        self.is_gone = False
        self.stdout = trio.lowlevel.FdStream(stdout)
        self.is_closed = trio.Event()
        self._stdin = trio.lowlevel.FdStream(stdin)
        self._status = trio.lowlevel.FdStream(status)
        self._told = b""

    async def begin(self) -> bool:
        """Return once it runs; False where nobody can tell any more. Raises NotForked."""
        line = await self._read_line()
        if line.startswith("failed "):
            raise NotForked(1, f"no process can be started: {line.removeprefix('failed ')}")
        self.pid = int(line or 0)
        return bool(line)

    async def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        if self.returncode is None:
            told = await self._read_line()
            self.is_gone = bool(told)
            # Where nobody can tell any more, its server has been killed, and it was with that.
            self.returncode = int(told or -signal.SIGKILL)
        return self.returncode

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Have it end in order."""
        self._signal(signal.SIGTERM)

    def close(self) -> None:
        """Let go of it; if it still runs, it sees the end of its stdin."""
        for stream in (self._stdin, self.stdout, self._status):
            stream.close()
        self.is_closed.set()

    def _signal(self, number: int) -> None:
        # Until its status is read, nothing else can have its process id.
        if self.returncode is None:
            with suppress(ProcessLookupError):  # its server has died with it
                os.kill(self.pid, number)

    async def _read_line(self) -> str:
        while b"\n" not in self._told:
            data = await self._status.receive_some()
            if not data:
                return ""
            self._told += data
        line, _, self._told = self._told.partition(b"\n")
        return line.decode()


class Forks:
    """Starts workers, and what they are forks of where there is none, or none any more."""

    def __init__(self) -> None:
        self._server: ForkServer | None = None
        self._workers: list[ForkedWorker] = []

    @property
    def pid(self) -> int | None:
        """Of what workers are forks of: it is busy importing before the first can start."""
        return None if self._server is None else self._server.process.pid

    async def start(self, arguments: Sequence[str | int]) -> ForkedWorker:
        """A worker with these arguments; integers are descriptors that it is handed.

        Whoever gets it closes it. Raises NotForked.
        """
        try:
            server, worker = self._request(arguments)
        except OSError as error:
            # Whoever cancels this gives up what is handed on as well, maybe before that.
            await trio.lowlevel.checkpoint_if_cancelled()
            raise NotForked(1, f"no process can be started: {error.strerror}") from error
        self._workers = [each for each in self._workers if not each.is_closed.is_set()]
        self._workers.append(worker)
        try:
            if not await worker.begin():
                raise NotForked(self._bury(server), None)
        except BaseException:
            worker.close()
            raise
        return worker

    def kill(self) -> None:
        """End what they are forks of at once, and all of them with it."""
        if self._server is not None:
            self._server.process.kill()

    async def aclose(self) -> None:
        """End what they are forks of, once whoever got them has closed them all."""
        for worker in self._workers:
            await worker.is_closed.wait()
        server = self._server
        if server is None:
            return
        if self._workers and all(worker.pid for worker in self._workers):
            # All have ended; and it alone can see to it that nothing is left of them.
            server.requests.close()
            with suppress(subprocess.TimeoutExpired):  # it hangs
                server.process.wait(2 * LEAVE_SECONDS)
        self._bury(server)

    def _request(self, arguments: Sequence[str | int]) -> tuple[ForkServer, ForkedWorker]:
        """Ask for one. Raises OSError."""
        line = json.dumps(arguments).encode() + b"\n"
        handed = [each for each in arguments if isinstance(each, int)]
        ours, theirs = _open_pipes()
        with ExitStack() as undo:
            worker = ForkedWorker(*ours)
            undo.callback(worker.close)
            try:
                server = self._send(line, [*theirs, *handed])
            finally:
                for fd in theirs:
                    os.close(fd)
            undo.pop_all()
        return server, worker

    def _send(self, line: bytes, descriptors: Sequence[int]) -> ForkServer:
        if self._server is not None:
            try:
                socket.send_fds(self._server.requests, [line], descriptors)
                return self._server
            except OSError:  # somebody has killed it since
                self._bury(self._server)
        self._server = started()
        socket.send_fds(self._server.requests, [line], descriptors)
        return self._server

    def _bury(self, server: ForkServer) -> int:
        """The status that it ended with, or ends with now."""
        if server is not self._server:
            return -signal.SIGKILL  # somebody else has, and has been told
        self._server = None
        server.requests.close()
        server.process.kill()
        return server.process.wait()


def _open_pipes() -> tuple[list[int], list[int]]:
    """Our ends, and a worker's, of its stdin, its stdout and its status. Raises OSError."""
    ours, theirs = [], []
    with ExitStack() as undo:
        for is_written in (True, False, False):
            pipe = os.pipe()
            for fd in pipe:
                undo.callback(os.close, fd)
            ours.append(pipe[is_written])
            theirs.append(pipe[not is_written])
        undo.pop_all()
    return ours, theirs
