"""Worker processes on the orchestrator's machine, restarted when they die."""

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from pipeline.agreement.addresses import StageEndpoint
from pipeline.agreement.manifest import Manifest
from pipeline.errors import (
    InputError,
    SessionError,
    StageHung,
    StageLost,
    StageMismatch,
    StageSilent,
)
from pipeline.placement.attempts import Attempts
from pipeline.placement.base import Progress, results_at
from pipeline.placement.forked_worker import ForkedWorker, Forks, NotForked
from pipeline.tasks import open_tasks
from pipeline.worker_report import MAX_LINE_BYTES, Failed, Listening, Loaded, Report, parse_report
from transport.dial_and_listen import Endpoint

logger = logging.getLogger(__name__)

# What a worker exits with when its input is unusable: trying again would not help.
EXIT_BAD_INPUT = 2
STOP_SECONDS = 5.0
# Of as many other stages may a worker leave the weights: their descriptors come in one message.
MAX_BESIDE = 32
# For the last lines of a worker that has ended; what it started may hold its stdout open.
LAST_WORDS_SECONDS = 1.0


class Supervisor:
    """One worker process per stage, in this process's group.

    What a worker has loaded and verified is handed on to its successors, where this system has
    memory that can be sealed: they map it and read nothing. So are keys and values of its session,
    if it was killed: what ends by a fault of its own may have spoilt them. Of stages whose weights
    are in the same files, the first worker reads those for all, and leaves each stage its own. And
    all are forks of one process, which has imported everything: a successor is there sooner by what
    starting an interpreter takes.

    Workers say on stdout how far they are, and why they end (`pipeline.worker_report`).
    """

    def __init__(
        self,
        manifest: Manifest,
        arguments: Callable[[int], Sequence[str]],
        tasks: trio.Nursery,
        on_change: Callable[[], None] = lambda: None,
        alike: Callable[[int], Sequence[int]] = lambda _: (),
    ) -> None:
        """`arguments` of a stage follow `stage-worker --stage-idx I`.

        `on_change` hears that a worker has begun, told something, or ended. `alike`: the other
        stages whose weights are in the same files as a stage's, for one worker to read for all.

        `tasks` keep the processes running; cancelled, they end them. They raise InputError when a
        stage's first worker finds its input unusable.
        """
        self._manifest = manifest
        self._arguments = arguments
        self._tasks = tasks
        self._on_change = on_change
        self._alike = alike
        self._kept: set[int] = set()
        self._forks = Forks()
        # Stages whose worker is about to be forked.
        self._starting: set[int] = set()
        self._processes: dict[int, ForkedWorker] = {}
        self._attempts: dict[int, Attempts] = {}
        # How much of its weights each that loads has read.
        self._loaded: dict[int, Loaded] = {}
        # Where those that listen do.
        self._listening: dict[int, Listening] = {}
        # How far a stage had come when it last was silent in a handshake.
        self._silent_at: dict[int, Progress | None] = {}
        # Where the weights of each stage lie, and where its session's keys and values do.
        self._weights: dict[int, int] = {}
        self._sessions: dict[int, int] = {}
        tasks.start_soon(self._hold)

    async def start(self, stage_idx: int) -> None:
        """Keep the stage's worker running from now on."""
        if stage_idx not in self._kept:
            self._kept.add(stage_idx)
            self._attempts[stage_idx] = Attempts(stage_idx)
            for idx in (stage_idx, *self._alike(stage_idx)):
                self._make_room(idx)
            if stage_idx in self._weights:
                self._renew_session(stage_idx)
            self._tasks.start_soon(self._keep, stage_idx)

    def where(self, stage_idx: int) -> StageEndpoint:
        """Where the manifest says; workers listen there. Raises ManifestError."""
        return self._manifest.endpoint(stage_idx)

    def listening(self, stage_idx: int) -> Listening | None:
        """Where the stage's worker says that it listens, once it does."""
        return self._listening.get(stage_idx)

    @property
    def results_at(self) -> Endpoint | None:
        """Where the manifest says."""
        return results_at(self._manifest)

    def on_loss(self, error: SessionError) -> None:
        """Make way for a successor of a stage that hangs, or has read another manifest.

        Neither ends by itself, and a successor reads the files as they are then.

        Attack: strangers who hold all its places for handshakes make a healthy worker as silent as
        one that hangs, and would have it killed again and again. But it runs meanwhile.
        """
        if not isinstance(error, StageLost | StageMismatch) or error.stage_idx is None:
            return
        stage_idx, makes_way = error.stage_idx, isinstance(error, StageHung | StageMismatch)
        if isinstance(error, StageSilent):
            now = self.progress(stage_idx)
            makes_way = now is not None and self._silent_at.get(stage_idx) == now
            self._silent_at[stage_idx] = now
        if makes_way and stage_idx in self._processes:
            self._processes[stage_idx].kill()

    def progress(self, stage_idx: int) -> Progress | None:
        """What the worker has computed and read; None where this system does not tell."""
        pid = self._forks.pid if stage_idx in self._starting else self.pid(stage_idx)
        if pid is None:
            return None
        try:
            seconds = time.clock_gettime(_cpu_clock(pid))
        except OSError:
            return None
        return Progress(pid, seconds, self._loaded.get(stage_idx))

    def problem(self, stage_idx: int) -> str | None:
        """What the workers that could not be started said of it, until one listens."""
        attempts = self._attempts.get(stage_idx)
        return None if attempts is None else attempts.problem

    def pid(self, stage_idx: int) -> int | None:
        """The worker's process id, if it is running."""
        process = self._processes.get(stage_idx)
        return None if process is None else process.pid

    async def _keep(self, stage_idx: int) -> None:
        attempts, has_run = self._attempts[stage_idx], False
        while True:
            code, reason = await self._run_worker(stage_idx, attempts)
            if code == EXIT_BAD_INPUT and not has_run:
                raise InputError(f"the worker of stage {stage_idx} cannot start: {reason}")
            # What served it before is perhaps just being replaced by somebody.
            has_run = True
            pause_seconds = attempts.died(code, reason)
            self._on_change()
            await trio.sleep(pause_seconds)

    async def _run_worker(self, stage_idx: int, attempts: Attempts) -> tuple[int, str | None]:
        """Its exit status, and what it said of that."""
        arguments = (
            *("--stage-idx", str(stage_idx), "--quiet", "--supervised"),
            *self._arguments(stage_idx),
        )
        try:
            process = await self._start(stage_idx, arguments)
        except NotForked as error:
            return error.code, error.reason
        self._processes[stage_idx] = process
        attempts.started(process.pid)
        self._on_change()
        reason: str | None = None

        async def listen() -> None:
            nonlocal reason
            async for report in _reports(process):
                match report:
                    case Loaded():
                        self._loaded[stage_idx] = report
                    case Listening():
                        self._listening[stage_idx] = report
                        attempts.listening()
                    case Failed(said):
                        reason = said
                self._on_change()

        try:
            async with open_tasks() as tasks:
                tasks.start_soon(listen)
                code = await process.wait()
                if code != -signal.SIGKILL or not process.is_gone:
                    self._renew_session(stage_idx)
                tasks.cancel_scope.deadline = trio.current_time() + LAST_WORDS_SECONDS
        finally:
            del self._processes[stage_idx]
            self._loaded.pop(stage_idx, None)
            self._listening.pop(stage_idx, None)
            await self._end(process)
        return code, reason

    async def _start(self, stage_idx: int, arguments: Sequence[str]) -> ForkedWorker:
        """Raises NotForked."""
        self._starting.add(stage_idx)
        try:
            handed: list[str | int] = []
            for flag, fds in (("--weights-fd", self._weights), ("--session-fd", self._sessions)):
                if (fd := fds.get(stage_idx)) is not None:
                    handed += [flag, fd]
            for idx in self._alike(stage_idx)[:MAX_BESIDE]:
                if (fd := self._weights.get(idx)) is not None:
                    handed += ["--beside-stage", str(idx), "--beside-fd", fd]
            return await self._forks.start([*arguments, *handed])
        finally:
            self._starting.discard(stage_idx)

    def _make_room(self, stage_idx: int) -> None:
        if stage_idx not in self._weights:
            is_first = not self._weights and len(self._kept) == 1
            fd = _new_memory(f"veilpipe-stage{stage_idx}", is_first=is_first)
            if fd is not None:
                self._weights[stage_idx] = fd

    def _renew_session(self, stage_idx: int) -> None:
        """Let go of what a session held; a worker that is not gone yet cannot reach the new."""
        if (fd := self._sessions.pop(stage_idx, None)) is not None:
            os.close(fd)
        fd = _new_memory(f"veilpipe-session{stage_idx}", is_first=False)
        if fd is not None:
            self._sessions[stage_idx] = fd

    async def _end(self, process: ForkedWorker) -> None:
        with trio.CancelScope(shield=True):
            # At last what tells of its end: if that hangs it is killed, and the worker with it.
            for end in (process.terminate, process.kill, self._forks.kill):
                if process.returncode is None:
                    end()
                    with trio.move_on_after(STOP_SECONDS):
                        await process.wait()
        process.close()

    async def _hold(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            for fd in (*self._weights.values(), *self._sessions.values()):
                os.close(fd)
            with trio.CancelScope(shield=True):
                await self._forks.aclose()


def _new_memory(name: str, *, is_first: bool) -> int | None:
    """A descriptor of memory that can be sealed, this user's alone; None where there is none."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        if is_first:
            logger.info("event=weights_not_kept detail=%r", str(error))
        return None
    os.fchmod(fd, 0o600)
    return fd


async def _reports(process: ForkedWorker) -> AsyncIterator[Report]:
    unread = b""
    async for data in process.stdout:
        *lines, unread = (unread + data).split(b"\n")
        unread = unread[:MAX_LINE_BYTES]
        for line in lines:
            if (report := parse_report(line)) is not None:
                yield report


def _cpu_clock(pid: int) -> int:
    """The clock of what a process computes, as Linux numbers it (clock_getcpuclockid)."""
    return (~pid << 3) | 2
