"""The `stage-worker` command: serve one stage of a manifest."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module

import trio

from pipeline.agreement.identity import machine_key
from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.agreement.trust_policy import EnclaveTrust, KeyedTrust, Trust
from pipeline.cli.compute_options import parse_cpus, precision_of
from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.health import Health, answering
from pipeline.cli.logs import configure_logging, held_back, tell_error
from pipeline.cli.progress import progress_bar
from pipeline.cli.service_manager import ServiceManager
from pipeline.cli.settings import for_these, takes_flags
from pipeline.cli.shared_options import results_address
from pipeline.cli.signals import run_until_signalled, wait_for_end_of_stdin
from pipeline.cli.slot_store import opened_store
from pipeline.cli.worker_flags import WorkerFlags
from pipeline.dtypes import Precision
from pipeline.errors import InputError
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.kernels.runtime import all_cpus, beside_a_reader, set_num_threads
from pipeline.kernels.sealed_memory import (
    SealedMemory,
    is_sealed,
    is_untouched,
    one_at_a_time,
)
from pipeline.kernels.session_memory import SessionMemory
from pipeline.models.layer_parts import OWN, LayerParts
from pipeline.models.registry import ModelShard
from pipeline.protocol.peer_connections import PATIENCE_MS
from pipeline.stage.dial_policy import parse_networks
from pipeline.stage.model_config import load_stage
from pipeline.stage.worker import StageWorker
from pipeline.stage.worker_setup import PartsSession, StageSetup
from pipeline.tasks import open_tasks
from pipeline.units import GIB
from pipeline.worker_report import Reporter, report_failure
from transport.dial_and_listen import Endpoint, listen

logger = logging.getLogger(__name__)


app = new_app()


@app.command()
@takes_flags(flags=WorkerFlags)
def serve(flags: WorkerFlags) -> None:
    """Serve stage I of a manifest until stopped.

    The worker loads its layers only, checks their hashes, prints `event=listening` and serves one
    orchestrator after another. Addresses: HOST:PORT, unix:/PATH, vsock:CID:PORT, and
    unix:/PATH:PORT for a vsock bridged over a UNIX socket, which listens at /PATH_PORT.
    `stage-worker door --help` tells how to serve requests and answers instead, `stage-worker offer
    --help` and `serve --help` how to have a home of yours say what is served.

    Example, the first of two stages on this machine:

    \b
        stage-worker --manifest manifests/smollm2_2stage.json --stage-idx 0 \\
                     --model-dir models/smollm2 --dev
    """
    configure_logging(
        verbose=flags.verbose,
        quiet=flags.quiet,
        log_format=flags.log_format,
        marks=flags.development.marks,
    )
    health = Health()
    with nullcontext() if flags.health is None else answering(flags.health, health):
        with held_back() if flags.supervised else nullcontext():
            prepared = _prepare(flags)
        _run(*prepared, flags, health)


def _prepare(flags: WorkerFlags) -> tuple[StageSetup, Endpoint, Endpoint]:
    """The stage, loaded, and where it listens for control and data. Raises PipelineError."""
    manifest, stage_idx = load_manifest(flags.manifest), flags.stage_idx
    if flags.core is not None and manifest.core_hash().hex() != flags.core:
        raise InputError(f"{flags.manifest} is another manifest than its supervisor serves")
    networks = parse_networks(flags.allow_dial)
    stage = manifest.stage(stage_idx)
    trust = _trust(manifest, stage_idx, flags)
    parts, parts_session = _parts(manifest, stage_idx, flags, trust)
    control, data_in = flags.control_listen, flags.data_in_listen
    if stage.endpoint is not None:
        control = control or stage.endpoint.control.to_endpoint()
        data_in = data_in or stage.endpoint.data_in.to_endpoint()
    data_out = results_address(manifest, stage_idx, flags.data_out_target, flags.data_out_port)
    if control is None or data_in is None:
        raise InputError(
            f"stage {stage_idx} has no endpoint in {flags.manifest}; "
            "give --control-listen and --data-in-listen"
        )
    precision = precision_of(flags.dtype, stage)
    pinned = () if flags.cpus is None else parse_cpus(flags.cpus, flags.threads)
    num_threads = len(pinned) or flags.threads or 1
    set_num_threads(num_threads, pinned)
    shard = _load(manifest, flags, precision, parts)
    session_fd = flags.session_fd if flags.development.dev else None
    setup = StageSetup(
        manifest=manifest,
        stage_idx=stage_idx,
        shard=shard,
        trust=trust,
        precision=precision,
        num_threads=num_threads,
        device=flags.device or "cpu",
        max_kv_bytes=None if flags.kv_memory is None else int(flags.kv_memory * GIB),
        num_pipelines=flags.pipelines,
        data_out=data_out,
        patience_ms=PATIENCE_MS,
        allow_dial=networks,
        times=flags.times.limits,
        session_memory=None if session_fd is None else SessionMemory(session_fd),
        parts_session=parts_session,
        # A supervisor's other workers are here as well, and wait meanwhile.
        while_replaying=all_cpus if flags.supervised and flags.threads is None else nullcontext,
    )
    return setup, control, data_in


def _load(
    manifest: Manifest, flags: WorkerFlags, precision: Precision, parts: LayerParts
) -> ModelShard:
    """The stage's layers. Raises ModelError, InputError."""
    with _memory(manifest, flags, parts) as (memory, beside):
        if flags.supervised and (memory is None or not memory.is_sealed):
            # However quiet a supervisor's workers are: what reads gigabytes is told once.
            logging.getLogger(load_stage.__module__).setLevel(logging.INFO)
        # Several workers of one supervisor would draw over each other.
        reporting = nullcontext(Reporter().loaded)
        told = reporting if flags.supervised else progress_bar("loading weights")
        with told as progress, beside_a_reader(others_wait=bool(beside)):
            return load_stage(
                manifest,
                flags.stage_idx,
                flags.model_dir,
                precision,
                flags.kernels or "auto",
                flags.device or "cpu",
                progress,
                memory,
                parts,
                beside,
            )


@contextmanager
def _memory(
    manifest: Manifest, flags: WorkerFlags, parts: LayerParts
) -> Iterator[tuple[SealedMemory | None, dict[int, SealedMemory]]]:
    """Memory for the stage's weights, and for those of others that are read in the same pass.

    Their workers wait here until that is done, and find theirs. Raises InputError.
    """
    fd, own = flags.weights_fd, flags.stage_idx
    # Never in an enclave: what it holds has come through its own hands, and goes with it.
    if fd is None or not flags.development.dev:
        yield None, {}
        return
    fds = {own: fd, **dict(zip(flags.beside_stage, flags.beside_fd, strict=False))}
    with ExitStack() as turn:
        if len(fds) > 1 and not is_sealed(fd):
            turn.enter_context(one_at_a_time(fds[min(fds)]))  # the same for all of them
        memory, beside = SealedMemory(fd), {}
        if not memory.is_sealed and _can_share(flags, parts):
            precisions = {idx: precision_of(flags.dtype, manifest.stage(idx)) for idx in fds}
            beside = {
                idx: SealedMemory(other)
                for idx, other in fds.items()
                if idx != own and precisions[idx] == precisions[own] and is_untouched(other)
            }
        if not beside:
            memory.claim()
            turn.close()  # nobody waits for what is this stage's alone
        yield memory, beside


def _can_share(flags: WorkerFlags, parts: LayerParts) -> bool:
    """Whether it has weights that others could be left theirs beside, and all CPUs for that."""
    is_native = flags.kernels != "torch" and flags.device in {None, "cpu"}
    is_native = is_native and parts.hold_weights_in_kernels and why_not_native() is None
    return is_native and flags.cpus is None


def _parts(
    manifest: Manifest, stage_idx: int, flags: WorkerFlags, trust: Trust
) -> tuple[LayerParts, PartsSession | None]:
    """What does the work of the stage's layers. Raises InputError."""
    is_own = manifest.part is None and stage_idx not in manifest.encoded_stages
    if is_own and flags.masks is None:
        return OWN, None
    try:
        # Not by a statement: an image carries what a stage's statements import, and asks nobody.
        home_parts = import_module("pipeline.cli.home_parts")
    except ModuleNotFoundError as error:
        raise InputError("a stage in an image asks no other worker, and encodes nothing") from error
    found = home_parts.stage_parts(
        manifest,
        stage_idx,
        flags.model_dir,
        trust,
        has_store=flags.store.url is not None,
        masks=flags.masks,
    )
    return found.parts, found.session


def _trust(manifest: Manifest, stage_idx: int, flags: WorkerFlags) -> Trust:
    # A supervisor has said so itself.
    if (trust := flags.development.trust(manifest, is_told=flags.supervised)) is not None:
        return trust
    if manifest.stage(stage_idx).machine_keys:
        return KeyedTrust.create(manifest, stage_idx, machine_key(flags.identity))
    return EnclaveTrust.create(manifest, stage_idx)


def _run(
    setup: StageSetup, control: Endpoint, data_in: Endpoint, flags: WorkerFlags, health: Health
) -> None:
    is_supervised = flags.supervised
    manager = ServiceManager({} if is_supervised else os.environ)
    worker: StageWorker | None = None

    async def leave() -> None:
        health.is_ready = False
        manager.stopping()
        if worker is not None:
            await worker.leave()

    async def main() -> None:
        nonlocal worker
        async with opened_store(flags.store, setup) as store:
            worker = StageWorker(replace(setup, store=store))
            await serve_on(worker)

    async def serve_on(worker: StageWorker) -> None:
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
                tasks.start_soon(manager.keep_informed, lambda: True)
                if flags.health is not None:
                    health.is_ready = True
                    tasks.start_soon(health.keep_turning)
                if is_supervised:
                    at = control_listener.endpoint, data_listener.endpoint
                    Reporter().listening(*map(str, at))
                    tasks.start_soon(_cancel_at_end_of_stdin, tasks.cancel_scope)
                await worker.serve(control_listener, data_listener, once=flags.once)
                tasks.cancel_scope.cancel()

    signals = [signal.SIGTERM]
    if is_supervised:
        # Ctrl-C reaches every process of a terminal; the supervisor says when its workers leave.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        signals.append(signal.SIGINT)
    number = run_until_signalled(main, leave, signals)
    if number is not None:
        name = signal.Signals(number).name
        logger.info("event=stopped stage=%d signal=%s", setup.stage_idx, name)


async def _cancel_at_end_of_stdin(scope: trio.CancelScope) -> None:
    await wait_for_end_of_stdin()
    scope.cancel()


def main() -> None:
    """Console entry point."""
    is_supervised = "--supervised" in sys.argv[1:]
    command = new_app()
    command.command()(for_these(sys.argv[1:], serve))
    run_app(command, "stage-worker", report_failure if is_supervised else tell_error)


if __name__ == "__main__":
    main()
