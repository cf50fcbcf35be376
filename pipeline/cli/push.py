"""`pipeline-orch push` and `parts`: what of a model lies on which of one's own machines."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import ORCHESTRATOR_KEY, own_identity, state_directory
from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.cli.cluster_flags import PartsFlags
from pipeline.cli.logs import tell as tell_as
from pipeline.cli.progress import progress_bar, progress_rows
from pipeline.cli.shard_directories import parts_dir, stage_dir
from pipeline.errors import InputError
from pipeline.machines.delivery import deliver, deliveries, is_cut, machines_of
from pipeline.machines.messages import Part
from pipeline.machines.visitor import Address, visiting
from pipeline.planning.shard import cut_stage

tell = partial(tell_as, "pipeline-orch")


def push_parts(path: Path, model_dir: Path | None) -> None:
    """Send every machine its part, and have it serve. Raises PipelineError."""
    manifest = load_manifest(path)
    machines_of(manifest)
    directory = parts_dir(path)
    for stage in manifest.stages:
        _cut_if_missing(manifest, stage.stage_idx, directory, model_dir)
    everything = deliveries(manifest, path, partial(stage_dir, directory))
    own = own_identity(state_directory(os.environ), ORCHESTRATOR_KEY)
    names = [f"stage {each.stage_idx} to {each.address.host_port}" for each in everything]
    with progress_rows(names) as progress:
        trio.run(deliver, own, everything, progress, tell)


def list_parts(flags: PartsFlags) -> None:
    """Print what lies where, once what is not wanted is gone. Raises PipelineError."""
    own = own_identity(state_directory(os.environ), ORCHESTRATOR_KEY)
    addresses = machines_of(load_manifest(flags.manifest))
    found = trio.run(_parts, own, addresses, flags)
    for address, parts in zip(addresses, found, strict=True):
        for part in parts:
            use = "used" if part.is_used else "unused"
            print(f"{address.host_port}  {part.digest}  {part.num_bytes / 1e6:.1f} MB  {use}")


async def _parts(
    own: X25519PrivateKey, addresses: Sequence[Address], flags: PartsFlags
) -> list[list[Part]]:
    found, num_removed = [], 0
    for address in addresses:
        async with visiting(address, own) as visit:
            parts = await visit.parts()
            while unwanted := [part.digest for part in parts if _is_unwanted(part, flags)]:
                await visit.remove(unwanted)
                num_removed += len(unwanted)
                parts = await visit.parts()
            found.append(parts)
    if flags.remove and not num_removed:
        raise InputError(f"--remove {flags.remove[0]}: no part's hash begins with that")
    return found


def _is_unwanted(part: Part, flags: PartsFlags) -> bool:
    is_named = any(name and part.digest.startswith(name.lower()) for name in flags.remove)
    return is_named or (flags.remove_unused and not part.is_used)


def _cut_if_missing(
    manifest: Manifest, stage_idx: int, directory: Path, model_dir: Path | None
) -> None:
    part = directory / f"stage{stage_idx}"
    if is_cut(part):
        return
    if model_dir is None:
        raise InputError(
            f"stage {stage_idx}'s part is not in {directory}; give --model-dir to cut it again"
        )
    shutil.rmtree(part, ignore_errors=True)
    with progress_bar("cutting weights") as progress:
        cut_stage(manifest, stage_idx, model_dir, part, progress)
