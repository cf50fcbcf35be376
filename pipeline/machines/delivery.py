"""Bringing each machine the part of its stage, and having it serve that."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError
from pipeline.files import is_file
from pipeline.machines.offer_line import is_place
from pipeline.machines.visitor import Address, MachineRefuses, visiting
from pipeline.models.config import CONFIG_FILE
from pipeline.progress import Progress
from pipeline.tasks import open_tasks
from pipeline.weights.checkpoint_index import SINGLE_FILE


@dataclass(frozen=True, slots=True)
class Delivery:
    """What goes to one machine: its own stage's files, and the manifest. Nothing of any other."""

    address: Address
    stage_idx: int
    manifest_digest: str
    # Digest, and where the bytes lie.
    files: tuple[tuple[str, Path], ...]


def machines_of(manifest: Manifest) -> list[Address]:
    """Each stage's machine. Raises InputError where the manifest is not of one's own machines."""
    found = []
    for stage in manifest.stages:
        endpoint = None if stage.endpoint is None else stage.endpoint.control.to_endpoint()
        if len(stage.machine_keys) != 1 or not is_place(endpoint):
            raise InputError(
                f"stage {stage.stage_idx} names no machine of your own, by key and address; "
                "`pipeline-orch join` writes manifests that do"
            )
        found.append(Address(endpoint, bytes.fromhex(stage.machine_keys[0])))
    return found


def is_cut(directory: Path) -> bool:
    """Whether a stage's part lies there. Raises InputError."""
    return is_file(directory / SINGLE_FILE) and is_file(directory / CONFIG_FILE)


def deliveries(manifest: Manifest, path: Path, stage_dir: Callable[[int], Path]) -> list[Delivery]:
    """What goes where, by a manifest and the file it was read from. Raises InputError."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    found = []
    for stage, address in zip(manifest.stages, machines_of(manifest), strict=True):
        if len(stage.weight_hashes) != 1 or manifest.config_hash is None:
            raise InputError(
                f"the manifest pins no part of stage {stage.stage_idx}; `pipeline-orch join` does"
            )
        directory = stage_dir(stage.stage_idx)
        # The large one last: for want of room for it, nothing has been sent in vain.
        files = (
            (manifest.config_hash, directory / CONFIG_FILE),
            (digest, path),
            (stage.weight_hashes[0], directory / SINGLE_FILE),
        )
        found.append(Delivery(address, stage.stage_idx, digest, files))
    return found


async def deliver(
    own: X25519PrivateKey,
    everything: Sequence[Delivery],
    progress: Callable[[int], Progress | None],
    tell: Callable[[str], None],
) -> None:
    """Bring all machines their parts, at once, and have them serve. Raises SessionError."""
    async with open_tasks() as tasks:
        for delivery in everything:
            tasks.start_soon(_deliver, own, delivery, progress(delivery.stage_idx), tell)


async def _deliver(
    own: X25519PrivateKey,
    delivery: Delivery,
    progress: Progress | None,
    tell: Callable[[str], None],
) -> None:
    async with visiting(delivery.address, own) as visit:
        began, num_bytes = trio.current_time(), 0
        for digest, path in delivery.files:
            try:
                num_bytes += await visit.put(digest, path, progress)
            except MachineRefuses:
                await trio.to_thread.run_sync(_check_own, digest, path)
                raise
        seconds = trio.current_time() - began
        await visit.serve(delivery.manifest_digest, delivery.stage_idx)
    tell(
        f"stage {delivery.stage_idx} is served by {delivery.address}: "
        f"{num_bytes / 1e6:.1f} MB sent in {seconds:.1f} s"
    )


def _check_own(digest: str, path: Path) -> None:
    """Raises InputError where it is the file here that is not what the manifest pins."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if found != digest:
        raise InputError(
            f"{path} has changed since it was cut; remove it, and have it cut again by "
            "`pipeline-orch push --model-dir`"
        )
