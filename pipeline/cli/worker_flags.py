"""The flags of serving one stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.cli.compute_options import (
    CPUS_HELP,
    DeviceFlag,
    DTypeFlag,
    KernelsFlag,
    KvMemoryFlag,
    MasksFlag,
    ThreadsFlag,
)
from pipeline.cli.development import Development
from pipeline.cli.kv_store_flags import KvStoreFlags
from pipeline.cli.logs import LogFormat
from pipeline.cli.model_directory import ModelDir
from pipeline.cli.settings import Address, Flag, Settings
from pipeline.cli.shared_options import (
    DataOutPortFlag,
    LogFormatFlag,
    ManifestFlag,
    QuietFlag,
    VerboseFlag,
)
from pipeline.cli.time_flags import StageTimes

TENSORIZED_VARIABLE = "INFEMERAL_SERVER_TENSORIZED_WEIGHTS_PATH"
# Where an older system's server had its weights: in a tensorizer's file, if that is there.
OLDER_WEIGHTS = (TENSORIZED_VARIABLE, "INFEMERAL_SERVER_WEIGHTS_PATH")


class WorkerFlags(Settings):
    """Which stage to serve where, and how it computes."""

    manifest: ManifestFlag
    stage_idx: Annotated[int, Flag("I", "Which stage of the manifest.")]
    model_dir: Annotated[
        ModelDir,
        Flag(
            "DIR|NAME",
            "config.json and *.safetensors of the model.",
            older=OLDER_WEIGHTS,
            if_there=frozenset({TENSORIZED_VARIABLE}),
        ),
    ]
    data_out_target: Annotated[
        Address | None, Flag("ADDR", "Where to send results [manifest's data_out].")
    ] = None
    data_out_port: DataOutPortFlag = None
    control_listen: Annotated[
        Address | None, Flag("ADDR", "Where the orchestrator connects [manifest's control].")
    ] = None
    data_in_listen: Annotated[
        Address | None, Flag("ADDR", "Where the stage before connects [manifest's data_in].")
    ] = None
    allow_dial: Annotated[
        tuple[str, ...],
        Flag("CIDR", "Also dial there [only what the manifest names].", is_by_hand=True),
    ] = ()
    identity: Annotated[
        Path | None, Flag("FILE", "This stage's key, where the manifest names it [the machine's].")
    ] = None
    masks: MasksFlag = None
    dtype: DTypeFlag = None
    kernels: KernelsFlag = None
    threads: ThreadsFlag = None
    cpus: Annotated[str | None, Flag("LIST", f"{CPUS_HELP} [none].")] = None
    device: DeviceFlag = None
    kv_memory: KvMemoryFlag = None
    store: KvStoreFlags
    times: StageTimes
    health: Annotated[
        Address | None, Flag("ADDR", "Answer /livez and /readyz there, in plain HTTP [nowhere].")
    ] = None
    once: Annotated[bool, Flag(None, "Exit after the first session.")] = False
    supervised: Annotated[
        bool, Flag(None, "End with stdin, report on stdout: for supervisors.", is_by_hand=True)
    ] = False
    core: Annotated[
        str | None, Flag("HASH", "The core that is served: for supervisors.", is_by_hand=True)
    ] = None
    weights_fd: Annotated[
        int | None,
        Field(ge=0, le=(1 << 31) - 1),
        Flag("FD", "Sealed memory for weights: for supervisors.", is_by_hand=True),
    ] = None
    beside_stage: Annotated[
        tuple[int, ...],
        Flag("I", "Another stage of the same files: for supervisors.", is_by_hand=True),
    ] = ()
    beside_fd: Annotated[
        tuple[int, ...],
        Flag("FD", "Sealed memory for the weights of that: for supervisors.", is_by_hand=True),
    ] = ()
    pipelines: Annotated[
        int,
        Field(ge=1, le=1024),
        Flag("N", "Alike pipelines that share this machine: for supervisors.", is_by_hand=True),
    ] = 1
    session_fd: Annotated[
        int | None,
        Field(ge=0, le=(1 << 31) - 1),
        Flag("FD", "Memory for keys and values: for supervisors.", is_by_hand=True),
    ] = None
    development: Development
    quiet: QuietFlag = False
    verbose: VerboseFlag = False
    log_format: LogFormatFlag = LogFormat.TEXT

    @classmethod
    def environment(cls, given: Mapping[str, object]) -> Mapping[str, str]:
        """None beside a supervisor, which has said everything: its variables are for itself."""
        return {} if given.get("supervised") else super().environment(given)
