"""The flags of having a Ray cluster run the stages."""

import json
import re
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from pipeline.agreement.manifest import Manifest
from pipeline.cli.compute_options import WorkerOptions
from pipeline.cli.development import Development
from pipeline.cli.logs import LogFormat
from pipeline.cli.model_directory import ModelDir
from pipeline.cli.settings import Finite, Flag, Settings
from pipeline.cli.shard_directories import stage_dir
from pipeline.cli.shared_options import LogFormatFlag, ManifestFlag, VerboseFlag
from pipeline.errors import InputError
from pipeline.placement.ray.strategy import Strategy
from pipeline.units import GIB

if TYPE_CHECKING:
    from pipeline.placement.ray.messages import Job

# Where stages may dial each other: networks that are somebody's own, and not where clouds tell
# machines their secrets (169.254.0.0/16).
OWN_NETWORKS = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8",
                "fc00::/7", "::1/128")  # fmt: skip


class WorkersToPlace(Protocol):
    """What a command says of the workers that it has started."""

    @property
    def workers(self) -> WorkerOptions:
        """How they compute."""
        ...

    @property
    def development(self) -> Development:
        """What they give up."""
        ...

    @property
    def log_format(self) -> LogFormat:
        """How they log."""
        ...


class RayOptions(Settings):
    """Which cluster, and what a stage takes of a node."""

    ray_address: Annotated[
        str | None, Flag("ADDR", "The cluster's head: HOST:PORT, or auto [auto].")
    ] = None
    ray_strategy: Annotated[
        Strategy | None,
        Flag("NAME", "PACK, SPREAD, STRICT_PACK or STRICT_SPREAD over the nodes [SPREAD]."),
    ] = None
    ray_cpus: Annotated[
        Annotated[Finite, Field(ge=0.001)] | None,
        Flag("N", "What a stage takes of a node's CPUs [--threads]."),
    ] = None
    ray_memory: Annotated[
        Annotated[Finite, Field(ge=0.001)] | None,
        Flag("GIB", "What a stage takes of a node's memory [not counted]."),
    ] = None
    ray_resource: Annotated[
        tuple[str, ...],
        Flag(
            "NAME=N",
            "What else a stage takes, an enclave's device; may be repeated.",
            is_by_hand=True,
        ),
    ] = ()
    ray_network: Annotated[
        tuple[str, ...],
        Flag(
            "CIDR",
            "Where stages may dial each other; may be repeated [private networks].",
            is_by_hand=True,
        ),
    ] = ()

    @property
    def given(self) -> list[str]:
        """The flags that were set."""
        return [f"--{name.replace('_', '-')}" for name, value in self if value not in (None, ())]

    def job(
        self,
        manifest: Manifest,
        model_dir: Path,
        worker_flags: "WorkersToPlace",
        num_replicas: int = 1,
    ) -> "Job":
        """What the cluster is to run; `model_dir` is a path on its nodes. Raises InputError.

        `num_replicas`: how many such jobs it gets.
        """
        from pipeline.placement.ray.messages import Job

        if manifest.part is not None:
            raise InputError("the manifest's part has an address, which Ray's workers do not get")
        workers = worker_flags.workers
        if workers.store.url is not None:
            # Attack: an engine that carries a store's URL carries the password in it.
            raise InputError("--kv-store is not for stages that Ray places; it may hold a password")
        own = workers.arguments(manifest)
        networks = self.ray_network or OWN_NETWORKS
        _check(networks)
        shared = [word for network in networks for word in ("--allow-dial", network)]
        shared += ["--log-format", worker_flags.log_format.value]
        shared += worker_flags.development.words()
        if num_replicas > 1:
            shared += ["--pipelines", str(num_replicas)]
        return Job(
            address=self.ray_address or "auto",
            strategy=self.ray_strategy or "SPREAD",
            needs=self._needs(workers.threads or 1),
            core=json.dumps(manifest.core()),
            arguments=tuple(
                (*shared, "--model-dir", str(stage_dir(model_dir, idx).absolute()), *own[idx])
                for idx in range(len(manifest.stages))
            ),
        )

    def _needs(self, threads: int) -> dict[str, float]:
        needs = {"CPU": self.ray_cpus or float(threads)}
        if self.ray_memory is not None:
            needs["memory"] = float(round(self.ray_memory * GIB))
        for text in self.ray_resource:
            match = re.fullmatch(r"([^=\s]+)=(\d+(?:\.\d+)?)", text)
            if match is None or float(match[2]) == 0 or match[1] in {"CPU", "memory", *needs}:
                raise InputError(
                    f"--ray-resource {text}: expected NAME=N, each name once and neither CPU nor "
                    "memory"
                )
            needs[match[1]] = float(match[2])
        return needs


def _check(networks: Sequence[str]) -> None:
    for text in networks:
        try:
            ip_network(text)
        except ValueError as error:
            raise InputError(f"--ray-network {text}: {error}") from error


class PlaceRayFlags(Settings):
    """Which stages a cluster is to run, and where to write where they are."""

    manifest: ManifestFlag
    model_dir: Annotated[ModelDir, Flag("DIR", "The workers' model, on every node.")]
    output: Annotated[
        Path,
        Flag(
            "FILE",
            "Write the manifest here with the addresses of stages, as they move.",
            ("--output", "--out", "-o"),
        ),
    ]
    ray: RayOptions
    workers: WorkerOptions
    development: Development
    verbose: VerboseFlag = False
    log_format: LogFormatFlag = LogFormat.TEXT
