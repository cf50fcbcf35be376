"""What a door serves, from the files of its shard to the handler behind the transports."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.agreement.trust_policy import DevTrust
from pipeline.doors.door_keys import load_older_key
from pipeline.doors.handler import DoorHandler, DoorSetup, open_door
from pipeline.dtypes import Precision
from pipeline.errors import InputError, PolicyError
from pipeline.kernels.runtime import set_num_threads
from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.store_url import open_store
from pipeline.stage.model_config import load_stage
from pipeline.stage.session_admission import free_kv_bytes
from transport.attestation.dev_authority import default_directory
from transport.attestation.interfaces import Attester
from transport.attestation.nsm import NsmAttester

NUM_SESSIONS = 8


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """Which shard, how it is computed, and where its sessions are kept."""

    model_dir: Path
    manifest: Path | None = None  # None: the one that `pipeline-orch shard` wrote beside the shard
    is_dev: bool = False
    ignores_measurements: bool = False  # in development: those that the manifest pins
    num_sessions: int = NUM_SESSIONS
    max_seq_len: int | None = None
    dtype: Precision | None = None
    kernels: str = "auto"
    threads: int = 1
    device: str = "cpu"
    older_key: Path | None = None
    kv_store: str | None = None
    store_limits: StoreLimits = field(default_factory=StoreLimits)


def load_door(options: ShardOptions) -> DoorSetup:
    """Load a shard, which takes its time. Raises InputError, PolicyError."""
    manifest = load_manifest(options.manifest or options.model_dir.parent / "manifest.json")
    stage = manifest.stage(0)
    if options.dtype is not None and stage.precision not in {None, options.dtype}:
        raise InputError(f"the weights are asked for in {options.dtype}, not {stage.precision}")
    attester = _attester(manifest, options)
    older = None if options.older_key is None else load_older_key(options.older_key)
    set_num_threads(options.threads, ())
    precision = options.dtype or stage.precision or "float32"
    shard = load_stage(
        manifest, 0, options.model_dir, precision, options.kernels, options.device, None
    )
    max_seq_len = options.max_seq_len or manifest.activation_spec.max_seq_len
    setup = DoorSetup(manifest, shard, attester, options.num_sessions, max_seq_len, older_key=older)
    needed, free = shard.kv_bytes(options.num_sessions, max_seq_len), free_kv_bytes(shard)
    if needed > free:
        raise InputError(
            f"{options.num_sessions} sessions of {max_seq_len} positions take {needed} bytes of "
            f"KV memory, and {free} are free; ask for fewer or shorter ones"
        )
    return setup


@asynccontextmanager
async def open_served(setup: DoorSetup, options: ShardOptions) -> AsyncIterator[DoorHandler]:
    """The handler of a shard that was loaded, with its store. Raises InputError, StoreError."""
    if options.kv_store is None:
        async with open_door(setup) as door:
            yield door
        return
    async with (
        open_store(options.kv_store, options.store_limits) as store,
        open_door(replace(setup, store=store)) as door,
    ):
        yield door


def _attester(manifest: Manifest, options: ShardOptions) -> Attester:
    """Who shows what runs here: the enclave's module, or this machine's development authority."""
    if options.is_dev:
        return DevTrust.for_manifest(
            manifest,
            default_directory(os.environ),
            ignores_measurements=options.ignores_measurements,
        ).attester
    if not manifest.stage(0).weight_hashes or manifest.config_hash is None:
        raise PolicyError(
            "the manifest pins no weight_hashes or no config_hash; `pipeline-orch plan` writes "
            "both, --dev does without"
        )
    return NsmAttester()
