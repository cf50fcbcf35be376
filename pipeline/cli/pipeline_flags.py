"""The flags of every command that drives a pipeline."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.agreement.manifest import Manifest
from pipeline.cli.compute_options import WorkerOptions
from pipeline.cli.development import Development
from pipeline.cli.logs import LogFormat
from pipeline.cli.ray_flags import RayOptions
from pipeline.cli.settings import Address, Count, Finite, Flag, Settings
from pipeline.cli.shared_options import DataOutPortFlag, LogFormatFlag, read_cids, results_address
from pipeline.cli.time_flags import HandshakeTimeoutFlag, RequestTimeoutFlag
from pipeline.errors import InputError
from pipeline.protocol.tide_window import DEFAULT_SINKS, TideWindow
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits
from transport.dial_and_listen import Endpoint
from transport.retries import RetryPolicy


class PipelineFlags(Settings):
    """How to reach the stages, how to start them here, and how much they may learn."""

    data_out_listen: Annotated[
        Address | None, Flag("ADDR", "Where the last stage delivers [last stage's data_out].")
    ] = None
    data_out_port: DataOutPortFlag = None
    cid: Annotated[
        tuple[str, ...],
        Flag("STAGE=CID", "A started enclave's; may be repeated [manifest's].", is_by_hand=True),
    ] = ()
    connect_timeout: Annotated[
        Finite, Field(ge=0.1), Flag("SECONDS", "Patience with stages not up nor loading.")
    ] = DEFAULT_TIMES.connect_seconds
    connect_attempts: Annotated[
        Count | None, Flag("N", "Dials of a stage that is not up, at most [no limit].")
    ] = None
    handshake_timeout: HandshakeTimeoutFlag = DEFAULT_TIMES.handshake_seconds
    request_timeout: RequestTimeoutFlag = None
    identity: Annotated[Path | None, Flag("FILE", "This orchestrator's key (see keygen).")] = None
    supervise: Annotated[bool, Flag(None, "Start the workers here, and survive their death.")] = (
        False
    )
    place: Annotated[
        Literal["ray"] | None,
        Flag("ray", "Have a cluster start the workers, and survive their and its nodes' death."),
    ] = None
    ray: RayOptions
    workers: WorkerOptions
    client_part: Annotated[
        Path | None,
        Flag(
            "PATH",
            "Embedding and head, for split client [--model-dir, or where the tokenizer is].",
            older=("INFEMERAL_CLIENT_WEIGHTS_PATH",),
        ),
    ] = None
    dp_epsilon: Annotated[
        float | None,
        Flag(
            "E",
            "Bound on what noisy rows tell [2 at a terminal].",
            older=("INFEMERAL_CRYPTO_DP_EPSILON",),
        ),
    ] = None
    dp_delta: Annotated[
        float | None,
        Flag("D", "The delta of that epsilon [1e-5].", older=("INFEMERAL_CRYPTO_DP_DELTA",)),
    ] = None
    hang_timeout: Annotated[
        Finite, Field(ge=0.5), Flag("SECONDS", "Patience with a silent stage.")
    ] = DEFAULT_TIMES.idle_seconds
    window: Annotated[
        int | None, Flag("N", "Keep the latest N tokens; texts may be longer [keep all].")
    ] = None
    sinks: Annotated[int | None, Flag("N", f"And the first of all [{DEFAULT_SINKS}].")] = None
    replan: Annotated[
        bool, Flag(None, "Where a machine of yours stays lost, go on over those that are left.")
    ] = False
    development: Development
    log_format: LogFormatFlag = LogFormat.TEXT

    @property
    def starts_workers(self) -> bool:
        """Whether this command has its workers started, here or by a cluster."""
        return self.supervise or self.place is not None

    @property
    def cids(self) -> dict[int, int]:
        """The CIDs of started enclaves, by stage. Raises InputError."""
        return read_cids(self.cid)

    @property
    def times(self) -> TimeLimits:
        """How long to wait for what."""
        return TimeLimits(
            connect_seconds=self.connect_timeout,
            handshake_seconds=self.handshake_timeout,
            idle_seconds=self.hang_timeout,
            request_seconds=self.request_timeout,
            retry=RetryPolicy(attempts=self.connect_attempts),
        )

    @property
    def tide_window(self) -> TideWindow | None:
        """What a slot keeps of a longer text. Raises InputError."""
        if self.window is None:
            if self.sinks is not None:
                raise InputError("--sinks says what a window keeps of the beginning; give --window")
            return None
        return TideWindow(self.window, DEFAULT_SINKS if self.sinks is None else self.sinks)

    def results_at(self, manifest: Manifest) -> Endpoint | None:
        """Where to listen for results; None for the manifest's address. Raises InputError."""
        last = len(manifest.stages) - 1
        return results_address(manifest, last, self.data_out_listen, self.data_out_port)
