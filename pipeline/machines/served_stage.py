"""The stage that a machine serves: of which manifest, from which parts, and loaded how."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from pipeline.agreement.trust_policy import KeyedTrust
from pipeline.errors import InputError, PipelineError, PolicyError
from pipeline.files import write_atomically
from pipeline.machines.part_store import PartStore
from pipeline.models.config import CONFIG_FILE
from pipeline.protocol.peer_connections import PATIENCE_MS
from pipeline.stage.model_config import load_stage
from pipeline.stage.worker import StageWorker
from pipeline.stage.worker_setup import StageSetup
from pipeline.weights.checkpoint_index import SINGLE_FILE

RECORD_FILE = "serving.json"
STAGE_DIRECTORY = "stage"


@dataclass(frozen=True, slots=True)
class Compute:
    """How this machine computes, whatever it serves."""

    kernels: str
    device: str
    num_threads: int
    max_kv_bytes: int | None  # None: what is free


@dataclass(frozen=True, slots=True)
class Order:
    """Which stage to serve: the digest of the manifest's text, and the index."""

    manifest: str
    stage_idx: int


@dataclass(frozen=True, slots=True)
class ServedStage:
    """A stage that is loaded, and whose sessions can begin."""

    order: Order
    manifest: Manifest
    worker: StageWorker
    num_bytes: int

    @property
    def digests(self) -> frozenset[str]:
        """The parts that it needs."""
        return _digests(self.order, self.manifest)


def read_order(order: Order, store: PartStore, homes: frozenset[bytes]) -> Manifest:
    """The manifest of an order, if this machine may serve it. Raises PipelineError.

    All of its orchestrators have to be known here: nobody is let in by another's manifest.
    """
    if not store.has(order.manifest):
        raise InputError("the manifest is not there; push it first")
    with store.path(order.manifest).open("rb") as file:
        manifest = parse_manifest(file.read(MAX_MANIFEST_BYTES + 1))
    strangers = {bytes.fromhex(key) for key in manifest.orchestrator_keys} - homes
    if strangers:
        raise PolicyError(
            f"the manifest lists an orchestrator that has not joined this machine, "
            f"{min(strangers).hex()}; join it with a line of `stage-worker offer` from there"
        )
    hashes = manifest.stage(order.stage_idx).weight_hashes
    if len(hashes) != 1 or manifest.config_hash is None:
        raise InputError("the manifest is of no parts; `pipeline-orch join` and `push` cut them")
    missing = [digest for digest in _digests(order, manifest) if not store.has(digest)]
    if missing:
        raise InputError(
            f"{len(missing)} of this stage's parts are not there; `pipeline-orch push` sends them"
        )
    return manifest


def load_served(
    order: Order,
    manifest: Manifest,
    own: X25519PrivateKey,
    directory: Path,
    store: PartStore,
    compute: Compute,
) -> ServedStage:
    """Load the stage from its parts; takes as long as that takes. Raises PipelineError."""
    stage = manifest.stage(order.stage_idx)
    trust = KeyedTrust.create(manifest, order.stage_idx, own)
    model_dir = _lay_out(directory / STAGE_DIRECTORY, store, manifest, order)
    precision = stage.precision or "float32"
    shard = load_stage(
        manifest, order.stage_idx, model_dir, precision, compute.kernels, compute.device, None
    )
    setup = StageSetup(
        manifest=manifest,
        stage_idx=order.stage_idx,
        shard=shard,
        trust=trust,
        precision=precision,
        num_threads=compute.num_threads,
        device=compute.device,
        max_kv_bytes=compute.max_kv_bytes,
        patience_ms=PATIENCE_MS,
    )
    return ServedStage(order, manifest, StageWorker(setup), shard.num_weight_bytes)


def remember(directory: Path, order: Order | None) -> None:
    """Keep what is served for the next start. Raises InputError."""
    path = directory / RECORD_FILE
    if order is None:
        path.unlink(missing_ok=True)
    else:
        record = {"manifest": order.manifest, "stage_idx": order.stage_idx}
        write_atomically(path, json.dumps(record) + "\n", is_private=True)


def remembered(directory: Path) -> Order | None:
    """What was served last. Raises InputError."""
    path = directory / RECORD_FILE
    try:
        record = json.loads(path.read_bytes())
        order = Order(str(record["manifest"]), int(record["stage_idx"]))
        bytes.fromhex(order.manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no record of a stage; remove it, and push again") from error
    return order


def _digests(order: Order, manifest: Manifest) -> frozenset[str]:
    assert manifest.config_hash is not None  # `read_order` has seen to it
    weights = manifest.stage(order.stage_idx).weight_hashes
    return frozenset({order.manifest, manifest.config_hash, *weights})


def _lay_out(directory: Path, store: PartStore, manifest: Manifest, order: Order) -> Path:
    """A model directory of the parts, under the names that models have. Raises PipelineError."""
    assert manifest.config_hash is not None
    (weights,) = manifest.stage(order.stage_idx).weight_hashes
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700)
        for name, digest in ((CONFIG_FILE, manifest.config_hash), (SINGLE_FILE, weights)):
            os.link(store.path(digest), directory / name)
    except OSError as error:
        raise PipelineError(f"cannot lay out the stage in {directory}: {error.strerror}") from error
    return directory
