"""`--replan`: where a machine of one's own stays lost, the model goes over those that are left."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import ORCHESTRATOR_KEY, own_identity, state_directory
from pipeline.agreement.manifest import Manifest
from pipeline.cli.cluster_plan import ClusterPlan
from pipeline.cli.logs import tell as tell_as
from pipeline.cli.shard_directories import parts_dir, stage_dir
from pipeline.errors import SessionError
from pipeline.machines.delivery import deliver, deliveries, machines_of
from pipeline.machines.survey import Survey
from pipeline.machines.visitor import Address, visiting
from pipeline.models.config import load_config
from pipeline.tasks import open_tasks

logger = logging.getLogger(__name__)

# The machines that are left may still be at the end of the session that has been given up.
SETTLE_SECONDS = 30.0
_PAUSE_SECONDS = 0.5
_SUFFIX = ".replanned"


@dataclass(frozen=True, slots=True)
class Replan:
    """What it takes to split the model anew. Beside the manifest's file, which stays as it is."""

    manifest: Manifest
    path: Path
    model_dir: Path

    def check(self) -> None:
        """Raises InputError for a manifest that is not of one's own machines, or another model."""
        machines_of(self.manifest)
        load_config(self.model_dir, self.manifest.config_hash)

    @property
    def output(self) -> Path:
        """Where the new manifest goes; its parts lie beside it."""
        return self.path.with_name(f"{self.path.stem.removesuffix(_SUFFIX)}{_SUFFIX}.json")

    async def __call__(self) -> tuple[Manifest, Path]:
        """Ask who is left, split, cut, and have all of them serve; the manifest and its file.

        Raises PipelineError where that cannot be done.
        """
        own = own_identity(state_directory(os.environ), ORCHESTRATOR_KEY)
        machines = machines_of(self.manifest)
        left = await _who_answers(machines, own)
        if not left:
            raise SessionError("none of the machines answers")
        kernels = {stage.kernels for stage in self.manifest.stages}
        cluster = ClusterPlan(
            self.model_dir,
            self.output,
            self.manifest.stages[0].precision or "float32",
            own,
            mixes_kernels=len(kernels) > 1,
        )
        found = await _survey(cluster, left)
        split = cluster.split(found)
        manifest = await trio.to_thread.run_sync(cluster.write, found, split)
        parts = deliveries(manifest, self.output, partial(stage_dir, parts_dir(self.output)))
        await deliver(own, parts, lambda _: None, partial(tell_as, "pipeline-orch"))
        logger.warning(
            "event=replanned machines=%s lost=%d manifest=%s",
            ",".join(each.address.host_port for each in parts),
            len(machines) - len(left),
            self.output,
        )
        return manifest, self.output


async def _who_answers(machines: Sequence[Address], own: X25519PrivateKey) -> list[Address]:
    """Those that let this home in, in their old order."""
    answered: set[Address] = set()

    async def knock(address: Address) -> None:
        try:
            async with visiting(address, own):
                answered.add(address)
        except SessionError as error:
            logger.warning("event=machine_lost error=%s", error)

    async with open_tasks() as tasks:
        for address in machines:
            tasks.start_soon(knock, address)
    return [address for address in machines if address in answered]


async def _survey(cluster: ClusterPlan, left: Sequence[Address]) -> Survey:
    """Raises SessionError where somebody is busy for long, or lost meanwhile."""
    give_up_at = trio.current_time() + SETTLE_SECONDS
    while True:
        try:
            return await cluster.survey(left)
        except SessionError:
            if trio.current_time() >= give_up_at:
                raise
        await trio.sleep(_PAUSE_SECONDS)
