"""How a worker computes: options of `stage-worker`, and of commands that start workers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.agreement.manifest import Manifest, StageSpec, check_precision
from pipeline.cli.kv_store_flags import KvStoreFlags
from pipeline.cli.settings import Finite, Flag, Settings
from pipeline.dtypes import Precision
from pipeline.errors import InputError

DTypeFlag = Annotated[
    str | None, Flag("TYPE", "Weights: float32, bfloat16, int8, int4 [manifest's, else float32].")
]
KernelsFlag = Annotated[
    str | None, Flag("NAME", "Arithmetic: auto, native (-avx512, -avx2, ...) or torch [auto].")
]
ThreadsFlag = Annotated[
    Annotated[int, Field(ge=1, le=1024)] | None, Flag("N", "Threads of a stage [1].")
]
DeviceFlag = Annotated[str | None, Flag("NAME", "Where to compute: cpu, cuda or cuda:N [cpu].")]
KvMemoryFlag = Annotated[
    Annotated[Finite, Field(ge=0.001, le=1 << 20)] | None,
    Flag("GIB", "KV memory of a session [the manifest's, or what is free]."),
]
MasksFlag = Annotated[
    Path | None, Flag("FILE", "Masks for what a linear worker is sent (see masks make).")
]
# What computes where nothing faster can: several times slower than native kernels.
SLOW_KERNELS = "torch"
# What says how the orchestrator computes as well, where it holds the ends of the model.
OF_BOTH_SIDES = frozenset({"--dtype", "--kernels", "--threads", "--device"})
CPUS_HELP = "CPUs to pin them to, one each: 0-3,8"


class WorkerOptions(Settings):
    """The options for workers that are started here; None is a worker's own default."""

    dtype: DTypeFlag = None
    kernels: KernelsFlag = None
    threads: ThreadsFlag = None
    cpus: Annotated[str | None, Flag("LIST", f"{CPUS_HELP}; a / between stages [none].")] = None
    device: DeviceFlag = None
    kv_memory: KvMemoryFlag = None
    masks: MasksFlag = None
    store: KvStoreFlags = KvStoreFlags()

    def given(self, *, has_client_ends: bool = False) -> list[str]:
        """The flags that were set and are for workers alone; some say how ends are computed too."""
        shared = OF_BOTH_SIDES if has_client_ends else frozenset()
        flags = self._flags(self.cpus)
        return [name for name, value in flags if value is not None and name not in shared]

    def arguments(
        self, manifest: Manifest, replica: int = 0, num_replicas: int = 1
    ) -> Sequence[Sequence[str]]:
        """What each stage's worker gets, in one of several pipelines.

        Raises InputError for what no worker could start with.
        """
        self._check(manifest)
        num_stages = len(manifest.stages)
        num_workers = num_stages * num_replicas
        parts = [None] if self.cpus is None else self.cpus.split("/")
        if len(parts) not in {1, num_stages, num_workers}:
            counts = " or ".join(map(str, dict.fromkeys((num_stages, num_workers))))
            raise InputError(
                f"--cpus {self.cpus}: expected one list of CPUs, or {counts} between slashes"
            )
        for part in parts:
            if part is not None:
                parse_cpus(part, self.threads)
        each = (parts * num_workers)[replica * num_stages :][:num_stages]
        return [
            [
                word
                for name, value in self._flags(cpus)
                if value is not None
                for word in (name, str(value))
            ]
            for cpus in each
        ]

    def _check(self, manifest: Manifest) -> None:
        """Say it once and here; every worker would say it, after it has been started."""
        for stage in manifest.stages:
            precision_of(self.dtype, stage)
        if self.kernels is not None:
            from pipeline.kernels.kernel_selection import check_choice

            check_choice(self.kernels)

    def _flags(self, cpus: str | None) -> Sequence[tuple[str, object]]:
        return (
            ("--dtype", self.dtype),
            ("--kernels", self.kernels),
            ("--threads", self.threads),
            ("--cpus", cpus),
            ("--device", self.device),
            ("--kv-memory", self.kv_memory),
            ("--masks", self.masks),
            *self.store.words(),
        )


def precision_of(flag: str | None, stage: StageSpec) -> Precision:
    """What a stage's weights are held in. Raises InputError where that is not the manifest's."""
    return agreed_precision(flag, stage.precision, f"stage {stage.stage_idx}")


def agreed_precision(flag: str | None, pinned: Precision | None, whose: str) -> Precision:
    """What weights are held in. Raises InputError where that is not what the manifest pins."""
    precision = check_precision(flag) if flag is not None else pinned or "float32"
    if pinned is not None and precision != pinned:
        raise InputError(
            f"--dtype {flag}: the manifest says {pinned} for {whose}, and all parties have to agree"
        )
    return precision


def parse_cpus(text: str, threads: int | None) -> tuple[int, ...]:
    """The CPUs of `0-3,8`, in that order. Raises InputError, also for other than `threads`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if match is None:
            raise InputError(f"--cpus {text}: expected CPUs like 0-3,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"--cpus {text}: {part} is no range")
        found += range(first, last + 1)
    if len(set(found)) != len(found):
        raise InputError(f"--cpus {text}: expected each CPU once")
    if threads not in {None, len(found)}:
        raise InputError(f"--cpus {text} has {len(found)} CPUs for --threads {threads}")
    return tuple(found)
