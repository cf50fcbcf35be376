"""On a node: what keeps a stage's worker running there, and tells of it."""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import trio

from pipeline.agreement.addresses import TcpAddress
from pipeline.agreement.manifest import parse_manifest
from pipeline.errors import InputError, StageHung, StageMismatch, StageSilent
from pipeline.placement.ray.messages import Kept, LossKind, cut
from pipeline.placement.worker_supervisor import Supervisor
from pipeline.tasks import open_tasks
from transport.dial_and_listen import TcpEndpoint

# Between two reports where nothing happens but that a worker computes.
PULSE_SECONDS = 1.0
# Before another first worker is tried where one could not use what it found.
UNUSABLE_SECONDS = 8.0
# Longer than a supervisor gives its workers.
STOP_SECONDS = 8.0
# A worker that is cut off from the engine serves on until another can have taken its place.
LINGER_SECONDS = 10.0


class StageKeeper:
    """Keeps a worker from its making on, in a thread of its own; other threads call its methods."""

    def __init__(self, stage_idx: int, core: str, arguments: Sequence[str], host: str) -> None:
        """`core`: the manifest without addresses; workers listen at `host`, at any free ports.

        Raises ManifestError.
        """
        self._stage_idx = stage_idx
        self._manifest = parse_manifest(core)
        self._core = core
        self._arguments = arguments
        self._host = host
        self._changed = threading.Condition()
        self._version = 0
        self._kept = Kept(node=host, keeper_pid=os.getpid(), pid=None)
        self._supervisor: Supervisor | None = None
        self._scope = trio.CancelScope()
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run,), daemon=True)
        self._thread.start()

    def report(self, seen: int) -> tuple[int, str]:
        """A `Kept` as JSON, and its version; waits for news where that is `seen`, and not long."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, PULSE_SECONDS)
            return self._version, self._kept.model_dump_json()

    def lose(self, kind: LossKind) -> None:
        """The orchestrator has lost the stage: as `Supervisor.on_loss`."""

        def lose() -> None:
            if self._supervisor is not None:
                self._supervisor.on_loss(_loss(kind, self._stage_idx))

        self._call(lose)

    def stop(self) -> None:
        """End the worker; returns when it has ended."""
        self._call(self._scope.cancel)
        self._thread.join(STOP_SECONDS)

    def _call(self, function: Callable[[], None]) -> None:
        """Have it called in the thread that keeps, if that still does."""
        self._has_begun.wait()
        with suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(function, trio_token=self._token)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._has_begun.set()
        with self._scope, _readable(self._core) as path:
            while True:
                try:
                    await self._keep(path)
                except InputError as error:
                    self._supervisor = None
                    self._tell(self._kept_now(cut(str(error)), is_unusable=True))
                await trio.sleep(UNUSABLE_SECONDS)

    async def _keep(self, manifest: str) -> None:
        listen = str(TcpEndpoint(self._host, 0))
        arguments = (
            *("--manifest", manifest, "--core", self._manifest.core_hash().hex()),
            *("--control-listen", listen, "--data-in-listen", listen),
            *self._arguments,
        )
        async with open_tasks() as tasks:
            supervisor = Supervisor(self._manifest, lambda _: arguments, tasks, self._look)
            self._supervisor = supervisor
            await supervisor.start(self._stage_idx)
            while True:
                self._look()
                await trio.sleep(PULSE_SECONDS)

    def _look(self) -> None:
        assert self._supervisor is not None  # only it, and whoever made it, has this looked at
        self._tell(self._kept_now(self._supervisor.problem(self._stage_idx)))

    def _kept_now(self, problem: str | None, *, is_unusable: bool = False) -> Kept:
        found = Kept(
            node=self._host,
            keeper_pid=os.getpid(),
            pid=None,
            problem=None if problem is None else cut(problem),
            is_unusable=is_unusable,
        )
        supervisor, idx = self._supervisor, self._stage_idx
        if supervisor is None:
            return found
        progress, listening = supervisor.progress(idx), supervisor.listening(idx)
        if progress is not None:
            found = found.model_copy(
                update={"seconds": progress.seconds, "loaded": progress.loaded}
            )
        if listening is not None:
            control, data_in = (TcpAddress(type="tcp", addr=each) for each in listening)
            found = found.model_copy(update={"control": control, "data_in": data_in})
        return found.model_copy(update={"pid": supervisor.pid(idx)})

    def _tell(self, kept: Kept) -> None:
        with self._changed:
            if kept != self._kept:
                self._kept = kept
                self._version += 1
                self._changed.notify_all()


def end_with(parent: int, stop: Callable[[], None]) -> None:
    """Have this process end some time after the one whose pidfd `parent` is.

    Ray leaves actors behind whose raylet is lost, and with them workers that nobody knows of.
    """

    def end() -> None:
        select.select([parent], [], [])
        time.sleep(LINGER_SECONDS)
        stop()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _loss(kind: LossKind, stage_idx: int) -> StageHung | StageSilent | StageMismatch:
    match kind:
        case "hung":
            return StageHung(stage_idx, kind)
        case "silent":
            return StageSilent(stage_idx, kind)
        case "mismatch":
            return StageMismatch(kind, stage_idx)


@contextmanager
def _readable(text: str) -> Iterator[str]:
    """A path by which children of this process read `text`, and of which nothing is ever left."""
    fd = os.memfd_create("manifest", os.MFD_CLOEXEC)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        yield f"/proc/{os.getpid()}/fd/{fd}"
