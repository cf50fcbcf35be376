"""The flags of every command that drives a pipeline."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.agreement.manifest import Manifest
from pipeline.cli.compute_options import (
    CPUS_HELP,
    DeviceOption,
    DTypeOption,
    KernelsOption,
    KvMemoryOption,
    ThreadsOption,
    WorkerOptions,
)
from pipeline.cli.logs import LogFormat, LogFormatOption
from pipeline.cli.shared_options import (
    DataOutPortOption,
    DevOption,
    finite,
    results_address,
    to_endpoint,
)
from transport.dial_and_listen import Endpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PipelineFlags:
    """The flags of every command that drives a pipeline."""

    identity: Path | None
    is_dev: bool
    data_out_listen: Endpoint | None
    data_out_port: int | None
    connect_seconds: float
    hang_seconds: float
    supervise: bool
    workers: WorkerOptions
    client_part: Path | None
    dp_epsilon: float | None
    dp_delta: float | None
    log_format: LogFormat

    def results_at(self, manifest: Manifest) -> Endpoint | None:
        """Where to listen for results; None for the manifest's address. Raises InputError."""
        last = len(manifest.stages) - 1
        return results_address(manifest, last, self.data_out_listen, self.data_out_port)


def pipeline_flags(
    data_out_listen: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Where the last stage delivers [last stage's data_out]."),
    ] = None,
    data_out_port: DataOutPortOption = None,
    connect_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="Patience with stages not up nor loading.",
            callback=finite,
        ),
    ] = 30.0,
    identity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="This orchestrator's key (see keygen).")
    ] = None,
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Start the workers here, and survive their death.")
    ] = False,
    dtype: DTypeOption = None,
    kernels: KernelsOption = None,
    threads: ThreadsOption = None,
    cpus: Annotated[
        str | None,
        typer.Option(metavar="LIST", help=f"{CPUS_HELP}; a / between stages [none]."),
    ] = None,
    device: DeviceOption = None,
    kv_memory: KvMemoryOption = None,
    client_part: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Embedding and head, for split client [--model-dir, or where the tokenizer is].",
        ),
    ] = None,
    dp_epsilon: Annotated[
        float | None,
        typer.Option(metavar="E", help="Bound on what noisy rows tell [2 at a terminal]."),
    ] = None,
    dp_delta: Annotated[
        float | None, typer.Option(metavar="D", help="The delta of that epsilon [1e-5].")
    ] = None,
    hang_timeout: Annotated[
        float,
        typer.Option(
            min=0.5, metavar="SECONDS", help="Patience with a silent stage.", callback=finite
        ),
    ] = 60.0,
    dev: DevOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> PipelineFlags:
    """What the command line says. Raises InputError."""
    workers = WorkerOptions(dtype, kernels, threads, cpus, device, kv_memory)
    return PipelineFlags(
        identity=identity,
        is_dev=dev,
        data_out_listen=to_endpoint(data_out_listen, "--data-out-listen"),
        data_out_port=data_out_port,
        connect_seconds=connect_timeout,
        hang_seconds=hang_timeout,
        supervise=supervise,
        workers=workers,
        client_part=client_part,
        dp_epsilon=dp_epsilon,
        dp_delta=dp_delta,
        log_format=log_format,
    )


Command = Callable[..., Any]


def takes_flags(**groups: Callable[..., Any]) -> Callable[[Command], Command]:
    """Give a typer command the flags of other functions too: it gets what `name` makes of them.

    Such a function may take those of further ones in the same way.
    """

    def add(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        flags = {
            name: inspect.signature(group, eval_str=True).parameters
            for name, group in groups.items()
        }

        @wraps(command)
        def run(**values: Any) -> Any:  # noqa: ANN401  (what typer found on the command line)
            for name, group in groups.items():
                values[name] = group(**{flag: values.pop(flag) for flag in flags[name]})
            return command(**values)

        merged = [each for each in own.values() if each.name not in groups]
        for group in flags.values():
            merged += group.values()
        # By name only: then those that must be given may come after those that need not.
        by_name = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in merged]
        run.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
        return run

    return add
