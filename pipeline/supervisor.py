"""Worker processes as children of the orchestrator's, restarted when they die."""

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from pipeline.errors import InputError, SessionError, StageHung
from pipeline.manifest import Manifest

logger = logging.getLogger(__name__)

# A worker that dies at once is tried again at growing intervals; one that has lived, at once.
FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 5.0
PROBATION_SECONDS = 30.0
# What a worker exits with when its input is unusable: trying again would not help.
EXIT_BAD_INPUT = 2
STOP_SECONDS = 5.0


class Supervisor:
    """One worker process per stage, as children of this process and in its process group."""

    def __init__(self, manifest: Manifest, arguments: Sequence[str]) -> None:
        """`arguments` follow `stage-worker --stage-idx I`."""
        self._num_stages = len(manifest.stages)
        self._arguments = tuple(arguments)
        self._processes: dict[int, trio.Process] = {}

    async def run(self) -> None:
        """Keep every stage's worker running until cancelled; then end them.

        Raises InputError when a worker finds its input unusable; it has said why on stderr.
        """
        async with trio.open_nursery() as nursery:
            for stage_idx in range(self._num_stages):
                nursery.start_soon(self._keep, stage_idx)

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
            if trio.current_time() - started > PROBATION_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            logger.warning("event=worker_died stage=%d code=%d", stage_idx, code)
            await trio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    async def _run_worker(self, stage_idx: int) -> int:
        command = [
            *(sys.executable, "-c", "from pipeline.cli.entry import stage_worker as w; w()"),
            *("--stage-idx", str(stage_idx), "--quiet", "--until-stdin-ends", *self._arguments),
        ]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE)
        self._processes[stage_idx] = process
        logger.info("event=worker_started stage=%d pid=%d", stage_idx, process.pid)
        try:
            return await process.wait()
        finally:
            del self._processes[stage_idx]
            with trio.CancelScope(shield=True):
                await _end(process)
                if process.stdin is not None:
                    await process.stdin.aclose()


async def _end(process: trio.Process) -> None:
    if process.returncode is None:
        process.terminate()
        with trio.move_on_after(STOP_SECONDS):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


def worker_arguments(
    manifest: Path, model_dir: Path, *, threads: int, is_dev: bool
) -> tuple[str, ...]:
    """The flags every supervised worker gets."""
    flags = ("--manifest", str(manifest), "--model-dir", str(model_dir), "--threads", str(threads))
    return (*flags, "--dev") if is_dev else flags
