"""`pipeline-orch place ray`: a cluster's stages, for orchestrators that run elsewhere."""

import logging

import typer

from pipeline.agreement.manifest import Manifest, dump_manifest, load_manifest
from pipeline.cli.logs import tell
from pipeline.cli.ray_flags import PlaceRayFlags
from pipeline.cli.signals import run_until_signalled
from pipeline.errors import InputError, ManifestError
from pipeline.files import check_writable, write_atomically
from pipeline.placement.ray.placement import RayPlacement
from pipeline.tasks import open_tasks

logger = logging.getLogger(__name__)


def place_on_ray(flags: PlaceRayFlags) -> None:
    """Place the stages, and write where they are, until stopped.

    Raises PipelineError, or typer.Exit after a signal.
    """
    manifest = load_manifest(flags.manifest)
    if flags.output.absolute() == flags.manifest.absolute():
        raise InputError("--output is the manifest itself; name another file")
    check_writable(flags.output)
    flags.development.trust(manifest)  # which says so loudly, and what it would not look at
    job = flags.ray.job(manifest, flags.model_dir, flags)

    async def main() -> None:
        async with open_tasks() as tasks:
            placement = RayPlacement(job, tasks, lambda: _write(manifest, placement, flags))
            async with open_tasks() as starting:
                for stage in manifest.stages:
                    starting.start_soon(placement.start, stage.stage_idx)
            tell("pipeline-orch", f"all stages are placed; {flags.output} says where")

    number = run_until_signalled(main)
    if number is not None:
        raise typer.Exit(0)


def _write(manifest: Manifest, placement: RayPlacement, flags: PlaceRayFlags) -> None:
    """Once all stages are somewhere, and when one is elsewhere."""
    try:
        where = map(placement.where, range(len(manifest.stages)))
        stages = [
            stage.model_copy(update={"endpoint": endpoint})
            for stage, endpoint in zip(manifest.stages, where, strict=True)
        ]
    except ManifestError:
        return
    text = dump_manifest(manifest.model_copy(update={"stages": tuple(stages)}))
    try:
        write_atomically(flags.output, text)
    except InputError as error:  # the next address is another chance
        logger.error("event=addresses_not_written error=%s", error)
