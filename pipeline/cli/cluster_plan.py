"""From machines of one's own to a manifest: what is found out, how it is split, what is cut."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import public_hex
from pipeline.agreement.manifest import Manifest, build_manifest, dump_manifest
from pipeline.cli.logs import tell as tell_as
from pipeline.cli.progress import progress_bar
from pipeline.cli.shard_directories import parts_dir
from pipeline.cli.software import software_version
from pipeline.dtypes import Precision
from pipeline.errors import InputError
from pipeline.files import write_atomically
from pipeline.machines.survey import Survey, Surveyed, survey
from pipeline.machines.visitor import Address
from pipeline.models.config import load_config
from pipeline.planning.measured_split import (
    MachineSpeed,
    MeasuredSplit,
    Way,
    load_of,
    split_by_speed,
)
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from transport.dial_and_listen import TcpEndpoint

tell = partial(tell_as, "pipeline-orch")


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """A model that is to be split over machines, and where that is written."""

    model_dir: Path
    output: Path
    precision: Precision
    own: X25519PrivateKey
    # Where the last machine brings results; None: home comes for them.
    home: TcpEndpoint | None = None
    mixes_kernels: bool = False

    async def survey(self, addresses: Sequence[Address]) -> Survey:
        """Ask and measure all machines. Raises SessionError, InputError."""
        head_dim = load_config(self.model_dir).head_dim
        return await survey(addresses, self.own, head_dim, software_version(), self.home, tell)

    def check_kernels(self, found: Survey) -> None:
        """Raises InputError where machines round differently, and nobody has said they may."""
        by_kernels: dict[str, list[str]] = {}
        for each in found.machines:
            by_kernels.setdefault(each.description.kernels, []).append(each.address.host_port)
        if len(by_kernels) > 1 and not self.mixes_kernels:
            shown = "; ".join(f"{name}: {', '.join(where)}" for name, where in by_kernels.items())
            raise InputError(
                f"these machines compute with kernels that round differently ({shown}); texts "
                "would depend on which machine has which layers: start some with --kernels torch, "
                "or give --mix-kernels"
            )

    def split(self, found: Survey) -> MeasuredSplit:
        """The layers by what was measured. Raises InputError."""
        self.check_kernels(found)
        load = load_of(self.model_dir, self.precision)
        speeds = [_speed(each) for each in found.machines]
        ways = {
            hop: Way(each.round_trip_seconds, each.bytes_per_second)
            for hop, each in found.ways.items()
        }
        with suppress(InputError):
            return split_by_speed(load, speeds, ways)
        # What lies there may be these very parts, or go: pushing finds out.
        speeds = [
            replace(speed, disk_bytes=speed.disk_bytes + each.parts_bytes)
            for speed, each in zip(speeds, found.machines, strict=True)
        ]
        try:
            return split_by_speed(load, speeds, ways)
        except InputError as error:
            why = next(iter(found.problems.values()), None)
            raise InputError(f"{error} ({why})" if why else str(error)) from error

    def write(self, found: Survey, split: MeasuredSplit) -> Manifest:
        """Cut the parts beside the manifest's file, and write that once they are there.

        Raises InputError.
        """
        manifest = self._plan(found, split)
        directory = parts_dir(self.output)
        new = directory.with_name(directory.name + ".new")
        try:
            shutil.rmtree(new, ignore_errors=True)
            with progress_bar("cutting weights") as progress:
                pinned = cut_model(manifest, self.model_dir, new, self.precision, progress)
            shutil.rmtree(directory, ignore_errors=True)
            new.replace(directory)
        except OSError as error:
            raise InputError(f"cannot write {directory}: {error.strerror}") from error
        write_atomically(self.output, dump_manifest(pinned))
        tell(f"wrote {self.output}")
        return pinned

    def _plan(self, found: Survey, split: MeasuredSplit) -> Manifest:
        """The manifest of that split, by the model's own files; its parts are cut by it."""
        options = PlanOptions(
            len(split.ends),
            orchestrator_keys=(public_hex(self.own),),
            precision=self.precision,
            ends=split.ends,
        )
        with progress_bar("hashing weights") as progress:
            fields = json.loads(dump_manifest(plan(self.model_dir, options, progress)))
        machines = [found.machines[index] for index in split.order]
        for stage, machine, after in zip(
            fields["stages"], machines, [*machines[1:], None], strict=True
        ):
            stage["machine_keys"] = [machine.address.key.hex()]
            stage["kernels"] = machine.description.kernels
            stage["endpoint"] = {
                "control": _tcp(machine.address.endpoint),
                "data_in": _tcp(machine.address.data_in),
            }
            data_out = machine.home if after is None else after.address.data_in
            if data_out is not None:
                stage["endpoint"]["data_out"] = _tcp(data_out)
        return build_manifest(fields, "cannot plan this")


def _speed(machine: Surveyed) -> MachineSpeed:
    return MachineSpeed(
        machine.address.host_port,
        machine.description.memory_bytes,
        machine.description.disk_bytes,
        machine.measured.bytes_per_second,
        machine.measured.flops,
    )


def _tcp(endpoint: TcpEndpoint) -> dict[str, str]:
    return {"type": "tcp", "addr": str(endpoint).removeprefix("tcp:")}
