"""The `stage-worker` command: serve one stage of a manifest."""

import logging
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import trio
import typer

from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.agreement.trust_policy import DEV_WARNING, DevTrust, EnclaveTrust, Trust
from pipeline.cli.compute_options import (
    CPUS_HELP,
    DeviceOption,
    DTypeOption,
    KernelsOption,
    KvMemoryOption,
    ThreadsOption,
    parse_cpus,
    precision_of,
)
from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.kv_store_flags import (
    KvMaxBytesOption,
    KvStoreOption,
    KvTtlOption,
    StoreFlags,
    opened_store,
    store_limits,
)
from pipeline.cli.logs import LogFormat, LogFormatOption, configure_logging
from pipeline.cli.model_config import agreed_config
from pipeline.cli.progress import progress_bar
from pipeline.cli.shared_options import (
    DataOutPortOption,
    DevOption,
    ManifestOption,
    VerboseOption,
    results_address,
    to_endpoint,
)
from pipeline.cli.signals import run_until_signalled, wait_for_end_of_stdin
from pipeline.dtypes import Precision
from pipeline.errors import InputError, PolicyError
from pipeline.kernels.runtime import set_num_threads
from pipeline.models.registry import ModelShard, load_shard
from pipeline.models.shard_model import NO_ENDS
from pipeline.progress import Progress
from pipeline.protocol.peer_connections import PATIENCE_MS
from pipeline.stage.dial_policy import parse_networks
from pipeline.stage.session_admission import free_kv_bytes
from pipeline.stage.worker import StageWorker
from pipeline.stage.worker_setup import StageSetup
from pipeline.tasks import open_tasks
from transport.attestation.dev_authority import default_directory
from transport.dial_and_listen import Endpoint, listen

logger = logging.getLogger(__name__)

GIB = 1 << 30
UNTIL_STDIN_ENDS = "--until-stdin-ends"
OLDER_VARIABLES = {"--model-dir": ("INFEMERAL_SERVER_WEIGHTS_PATH",)}

app = new_app()


@app.command()
def serve(
    manifest: ManifestOption,
    stage_idx: Annotated[int, typer.Option(metavar="I", help="Which stage of the manifest.")],
    model_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="config.json and *.safetensors of the model.")
    ],
    data_out_target: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Where to send results [manifest's data_out]."),
    ] = None,
    data_out_port: DataOutPortOption = None,
    control_listen: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Where the orchestrator connects [manifest's control]."),
    ] = None,
    data_in_listen: Annotated[
        str | None,
        typer.Option(metavar="ADDR", help="Where the stage before connects [manifest's data_in]."),
    ] = None,
    allow_dial: Annotated[
        list[str] | None,
        typer.Option(metavar="CIDR", help="Also dial there [only what the manifest names]."),
    ] = None,
    dtype: DTypeOption = None,
    kernels: KernelsOption = None,
    threads: ThreadsOption = None,
    cpus: Annotated[str | None, typer.Option(metavar="LIST", help=f"{CPUS_HELP} [none].")] = None,
    device: DeviceOption = None,
    kv_memory: KvMemoryOption = None,
    kv_store: KvStoreOption = None,
    kv_ttl: KvTtlOption = None,
    kv_max_bytes: KvMaxBytesOption = None,
    once: Annotated[bool, typer.Option("--once", help="Exit after the first session.")] = False,
    until_stdin_ends: Annotated[
        bool, typer.Option(UNTIL_STDIN_ENDS, help="End when stdin does: for supervisors.")
    ] = False,
    dev: DevOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Log warnings and errors only.")
    ] = False,
    verbose: VerboseOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Serve stage I of a manifest until stopped.

    The worker loads its layers only, checks their hashes, prints `event=listening` and serves one
    orchestrator after another. Addresses: HOST:PORT, unix:/path, vsock:CID:PORT.

    Example, the first of two stages on this machine:

    \b
        stage-worker --manifest manifests/smollm2_2stage.json --stage-idx 0 \\
                     --model-dir models/smollm2 --dev
    """
    configure_logging(verbose=verbose, quiet=quiet, log_format=log_format)
    loaded = load_manifest(manifest)
    networks = parse_networks(allow_dial or ())
    stage = loaded.stage(stage_idx)
    device = device or "cpu"
    trust = _trust(loaded, stage_idx, dev=dev)
    endpoint = stage.endpoint
    control = to_endpoint(control_listen, "--control-listen") or (
        endpoint.control.to_endpoint() if endpoint else None
    )
    data_in = to_endpoint(data_in_listen, "--data-in-listen") or (
        endpoint.data_in.to_endpoint() if endpoint else None
    )
    data_out = results_address(
        loaded, stage_idx, to_endpoint(data_out_target, "--data-out-target"), data_out_port
    )
    if control is None or data_in is None:
        raise InputError(
            f"stage {stage_idx} has no endpoint in {manifest}; "
            "give --control-listen and --data-in-listen"
        )
    precision = precision_of(dtype, stage)
    pinned = () if cpus is None else parse_cpus(cpus, threads)
    num_threads = len(pinned) or threads or 1
    set_num_threads(num_threads, pinned)
    # Several workers of one supervisor would draw over each other.
    with nullcontext() if until_stdin_ends else progress_bar("loading weights") as progress:
        shard = _load(loaded, stage_idx, model_dir, precision, kernels or "auto", device, progress)
    setup = StageSetup(
        manifest=loaded,
        stage_idx=stage_idx,
        shard=shard,
        trust=trust,
        precision=precision,
        num_threads=num_threads,
        device=device,
        max_kv_bytes=free_kv_bytes(shard) if kv_memory is None else int(kv_memory * GIB),
        data_out=data_out,
        patience_ms=PATIENCE_MS,
        allow_dial=networks,
    )
    limits = store_limits(kv_ttl, kv_max_bytes)
    store = None if kv_store is None else StoreFlags(kv_store, limits)
    _run(setup, control, data_in, store, once=once, until_stdin_ends=until_stdin_ends)


def _trust(manifest: Manifest, stage_idx: int, *, dev: bool) -> Trust:
    if dev:
        logger.warning("event=development_mode %s", DEV_WARNING)
        return DevTrust.create(default_directory(os.environ))
    return EnclaveTrust.create(manifest, stage_idx)


def _load(
    manifest: Manifest,
    stage_idx: int,
    model_dir: Path,
    precision: Precision,
    kernels: str,
    device: str,
    progress: Progress | None,
) -> ModelShard:
    stage = manifest.stage(stage_idx)
    if stage.require_weight_hashes and not stage.weight_hashes:
        raise PolicyError(
            f"stage {stage_idx} requires weight hashes and the manifest has none; "
            "`pipeline-orch plan` writes them"
        )
    return load_shard(
        model_dir,
        agreed_config(manifest, model_dir),
        stage.layer_start,
        stage.layer_end,
        dtype=precision,
        kernels=kernels,
        device=device,
        ends=NO_ENDS if manifest.has_client_ends else None,
        expected_hashes=stage.weight_hashes or None,
        progress=progress,
    )


def _run(
    setup: StageSetup,
    control: Endpoint,
    data_in: Endpoint,
    store: StoreFlags | None,
    *,
    once: bool,
    until_stdin_ends: bool,
) -> None:
    async def main() -> None:
        with listen(control) as control_listener, listen(data_in) as data_listener:
            logger.info(
                "event=listening stage=%d layers=%d-%d dtype=%s kernels=%s control=%s data_in=%s "
                "core=%s",
                setup.stage_idx,
                setup.shard.layer_start,
                setup.shard.layer_end,
                setup.precision,
                setup.shard.kernels.name,
                control_listener.endpoint,
                data_listener.endpoint,
                setup.manifest.core_hash().hex()[:16],
            )
            async with open_tasks() as tasks:
                if until_stdin_ends:
                    tasks.start_soon(_cancel_at_end_of_stdin, tasks.cancel_scope)
                async with opened_store(store, setup) as kept:
                    worker = StageWorker(replace(setup, store=kept))
                    await worker.serve(control_listener, data_listener, once=once)
                tasks.cancel_scope.cancel()

    number = run_until_signalled(main)
    if number is not None:
        name = signal.Signals(number).name
        logger.info("event=stopped stage=%d signal=%s", setup.stage_idx, name)


async def _cancel_at_end_of_stdin(scope: trio.CancelScope) -> None:
    await wait_for_end_of_stdin()
    scope.cancel()


def main() -> None:
    """Console entry point."""
    # A supervisor has said everything: what is in its environment is for itself.
    is_supervised = UNTIL_STDIN_ENDS in sys.argv
    run_app(app, "stage-worker", None if is_supervised else OLDER_VARIABLES)


if __name__ == "__main__":
    main()
