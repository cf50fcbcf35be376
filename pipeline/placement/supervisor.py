"""Worker processes as children of the orchestrator's, restarted when they die."""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError, SessionError, StageHung

logger = logging.getLogger(__name__)

# A worker that dies soon is tried again at growing intervals; one that has lived, at once.
FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 5.0
PROBATION_SECONDS = 5.0
# What a worker exits with when its input is unusable: trying again would not help.
EXIT_BAD_INPUT = 2
STOP_SECONDS = 5.0
# Until the next spare is started: whoever has just been replaced has work to catch up with.
QUIET_SECONDS = 1.0

# -P: else a module beside a downloaded model, in the directory the user is in, would be run.
COMMAND = (sys.executable, "-P", "-c", "from pipeline.cli.entry import stage_worker as w; w()")


class Supervisor:
    """One worker process per stage, as children of this process and in its process group.

    And a spare one, which has imported everything and waits to be told which stage to be: a
    successor is there sooner by the seconds that starting an interpreter takes.
    """

    def __init__(self, manifest: Manifest, arguments: Sequence[str]) -> None:
        """`arguments` follow `stage-worker --stage-idx I`."""
        self._num_stages = len(manifest.stages)
        self._arguments = tuple(arguments)
        self._processes: dict[int, trio.Process] = {}
        self._spare: trio.Process | None = None
        self._is_spare_taken = trio.Event()

    async def run(self) -> None:
        """Keep every stage's worker running until cancelled; then end them.

        Raises InputError when a worker finds its input unusable; it has said why on stderr.
        """
        async with trio.open_nursery() as nursery:
            for stage_idx in range(self._num_stages):
                nursery.start_soon(self._keep, stage_idx)
            nursery.start_soon(self._keep_spare)

    def on_loss(self, error: SessionError) -> None:
        """Make way for a successor of a stage that hangs: it will not end by itself."""
        if isinstance(error, StageHung) and error.stage_idx in self._processes:
            self._processes[error.stage_idx].kill()

    def pid(self, stage_idx: int) -> int | None:
        """The worker's process id, if it is running."""
        process = self._processes.get(stage_idx)
        return None if process is None else process.pid

    async def _keep(self, stage_idx: int) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            started = trio.current_time()
            code = await self._run_worker(stage_idx)
            if code == EXIT_BAD_INPUT:
                raise InputError(f"the worker of stage {stage_idx} cannot start; it says why above")
            logger.warning("event=worker_died stage=%d code=%d", stage_idx, code)
            if trio.current_time() - started > PROBATION_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            else:
                await trio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    async def _run_worker(self, stage_idx: int) -> int:
        arguments = (
            *("--stage-idx", str(stage_idx), "--quiet", "--until-stdin-ends"),
            *self._arguments,
        )
        process = await self._start(arguments)
        self._processes[stage_idx] = process
        logger.info("event=worker_started stage=%d pid=%d", stage_idx, process.pid)
        try:
            return await process.wait()
        finally:
            del self._processes[stage_idx]
            await _end(process)

    async def _start(self, arguments: Sequence[str]) -> trio.Process:
        spare, self._spare = self._spare, None
        if spare is None:
            return await trio.lowlevel.open_process([*COMMAND, *arguments], stdin=subprocess.PIPE)
        self._is_spare_taken.set()
        assert spare.stdin is not None  # asked for
        try:
            await spare.stdin.send_all(json.dumps(arguments).encode() + b"\n")
        except trio.BrokenResourceError:
            logger.debug("event=spare_died")  # its exit code says the same to the caller
        except BaseException:
            await _end(spare)
            raise
        return spare

    async def _keep_spare(self) -> None:
        while True:
            self._is_spare_taken = trio.Event()
            await trio.sleep(QUIET_SECONDS)
            spare = await trio.lowlevel.open_process(
                [*COMMAND, "--standby"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            try:
                assert spare.stdout is not None  # asked for
                async with spare.stdout:
                    if await spare.stdout.receive_some():
                        self._spare = spare
                        await self._is_spare_taken.wait()
            finally:
                if self._spare is spare or not self._is_spare_taken.is_set():
                    self._spare = None
                    await _end(spare)


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            process.terminate()
            with trio.move_on_after(STOP_SECONDS):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        if process.stdin is not None:
            await process.stdin.aclose()


def worker_arguments(
    manifest: Path, model_dir: Path, *, threads: int, is_dev: bool
) -> tuple[str, ...]:
    """The flags every supervised worker gets."""
    flags = ("--manifest", str(manifest), "--model-dir", str(model_dir), "--threads", str(threads))
    return (*flags, "--dev") if is_dev else flags
