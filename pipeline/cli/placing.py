"""Who runs the stages, by what the flags say: whoever has started them, this command, a cluster."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from pipeline.agreement.manifest import Manifest
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.shard_directories import stage_dir
from pipeline.errors import InputError
from pipeline.placement.base import Placement
from pipeline.placement.by_hand import ByHand
from pipeline.tasks import open_tasks
from transport.frozen import frozen


@frozen
class Replica:
    """Which of how many pipelines it is that have stages of the same manifest."""

    idx: int = 0
    of: int = 1


ALONE = Replica()


def placing(
    manifest: Manifest,
    path: Path,
    model_dir: Path | None,
    flags: PipelineFlags,
    replica: Replica = ALONE,
) -> Callable[[trio.Nursery], Placement]:
    """How stages are placed, given tasks to watch over them. Raises InputError."""
    if not flags.starts_workers:
        if replica.of > 1:
            raise InputError(
                "--replicas has the workers of each pipeline started; give --supervise or --place"
            )
        return lambda _: ByHand(manifest, path, flags.cids)
    if flags.supervise and flags.place is not None:
        raise InputError("--supervise starts workers here, and --place elsewhere; give one")
    if model_dir is None:
        flag = "--supervise" if flags.supervise else "--place"
        raise InputError(f"{flag} starts workers, which need --model-dir")
    if flags.place is not None:
        from pipeline.placement.ray.placement import RayPlacement

        job = flags.ray.job(manifest, model_dir, flags, replica.of)
        return lambda tasks: RayPlacement(job, tasks)
    from pipeline.placement.free_ports import HOST, FreePortSupervisor
    from pipeline.placement.worker_supervisor import Supervisor

    own = flags.workers.arguments(manifest, replica.idx, replica.of)
    shared = ["--manifest", str(path), "--core", manifest.core_hash().hex()]
    shared += ["--log-format", flags.log_format, *flags.development.words()]

    results_at = flags.results_at(manifest)
    last = len(manifest.stages) - 1

    def arguments(stage_idx: int) -> Sequence[str]:
        # Where the manifest does not say it, the last worker has to be told where results go.
        is_elsewhere = stage_idx == last and results_at is not None
        target = ("--data-out-target", str(results_at)) if is_elsewhere else ()
        model = ("--model-dir", str(stage_dir(model_dir, stage_idx)))
        return (*shared, *model, *own[stage_idx], *target)

    def alike(stage_idx: int) -> Sequence[int]:
        hashes = manifest.stages[stage_idx].weight_hashes
        others = (each for each in manifest.stages if each.stage_idx != stage_idx)
        return [each.stage_idx for each in others if hashes and each.weight_hashes == hashes]

    if replica.of == 1:
        return lambda tasks: Supervisor(manifest, arguments, tasks, alike=alike)
    if results_at is not None:
        raise InputError(
            "--replicas has each last stage dialed for its results; none arrive at an address here"
        )
    shared += ["--pipelines", str(replica.of), "--allow-dial", HOST]
    return lambda tasks: FreePortSupervisor(manifest, arguments, tasks, alike)


@asynccontextmanager
async def placed_early(
    manifest: Manifest, path: Path, model_dir: Path | None, flags: PipelineFlags
) -> AsyncIterator[Callable[[trio.Nursery], Placement]]:
    """Workers that this command starts here load already within. Raises InputError."""
    place = placing(manifest, path, model_dir, flags)
    async with open_tasks() as tasks:
        placement = place(tasks)
        for stage in manifest.stages:
            await placement.start(stage.stage_idx)
        await trio.lowlevel.checkpoint()  # on which they are asked for
        yield lambda _: placement
        tasks.cancel_scope.cancel()
