"""Writing a manifest: a split balanced by measured bytes, and the hashes that pin it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.agreement.manifest import Manifest, Split, build_manifest
from pipeline.agreement.pieces_spec import PiecesSpec
from pipeline.dtypes import Precision
from pipeline.errors import InputError
from pipeline.models.config import hash_config, load_config
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.registry import layer_bytes, required_files
from pipeline.progress import Progress
from pipeline.weights.checkpoint import pin_files
from pipeline.weights.file_pieces import FilePin
from transport.dial_and_listen import (
    PARENT_CID,
    Endpoint,
    TcpEndpoint,
    UnixEndpoint,
    VsockEndpoint,
)

# Stage i's enclave has CID 16 + i; 0 to 15 are free for others.
FIRST_CID = 16
CONTROL_PORT = 5000
DATA_PORT = 5001
RELAY_PORT = 6000


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Where the planned stages listen: stage i at `base_port` + 10 i, results at the next.

    `hosts`: one for all, or each stage's, in order; results then come to the last stage's host,
    unless one more names the orchestrator's.
    """

    num_stages: int
    hosts: tuple[str, ...] = ("127.0.0.1",)
    base_port: int = 9000
    orchestrator_keys: tuple[str, ...] = ()
    # Stages in Nitro enclaves, behind the relay that scripts/run_nitro.sh starts on `host`.
    in_enclaves: bool = False
    model_name: str | None = None
    wire_dtype: str = "F32"  # of activations between stages, as manifests spell it
    # What every stage holds its weights in; None leaves it to the stages.
    precision: Precision | None = None
    # Whether the ends of the model are the stages' or the orchestrator's.
    split: Split = "stages"
    # Noise of `sigma` on rows clipped to `clip`, where the ends are the orchestrator's.
    noise: tuple[float, float] | None = None
    # The end layer of each stage, where something better than bytes says so.
    ends: tuple[int, ...] | None = None
    # Of each stage, for keys and values; None leaves it to the stages.
    kv_bytes: int | None = None
    # What one untrusted worker is asked for, where it is and its key, if that is known.
    part: tuple[str, Endpoint, str | None] | None = None
    # Keys of stages on machines of one's own, in their order.
    stage_keys: tuple[str, ...] = ()
    # Layers of one stage at each end that stays at home; all stages between keep rows encoded.
    home_layers: tuple[int, int] | None = None
    # What encoded rows get beside secret keys, by the manifest's names; empty: nothing.
    encoding: Mapping[str, float] = field(default_factory=dict)


def split_layers(first: int, layers: Sequence[int], last: int, num_stages: int) -> list[int]:
    """End layer of each stage, so that the heaviest stage is as light as it can be.

    `first` and `last` are the bytes that come with the first and the last stage (embedding, head).
    Exact: dynamic programming over (stage, layer). Raises InputError for fewer layers than stages.
    """
    num_layers = len(layers)
    if not 1 <= num_stages <= num_layers:
        raise InputError(
            f"cannot split {num_layers} layers into {num_stages} stages; choose 1 to {num_layers}"
        )
    prefix = [0]
    for size in layers:
        prefix.append(prefix[-1] + size)

    def cost(start: int, end: int) -> int:
        extra = (first if start == 0 else 0) + (last if end == num_layers else 0)
        return prefix[end] - prefix[start] + extra

    @cache
    def best(start: int, stages: int) -> tuple[int, tuple[int, ...]]:
        if stages == 1:
            return cost(start, num_layers), (num_layers,)
        candidates = []
        for end in range(start + 1, num_layers - stages + 2):
            rest, ends = best(end, stages - 1)
            candidates.append((max(cost(start, end), rest), (end, *ends)))
        return min(candidates)

    return list(best(0, num_stages)[1])


def plan(model_dir: Path, options: PlanOptions, progress: Progress | None = None) -> Manifest:
    """Plan stages for a model directory, whose weights are read once, to hash them.

    Raises ModelError, ManifestError, InputError.
    """
    if options.model_name == "":
        raise InputError("the model's name is empty; give one")
    hosts = _hosts(options)
    config = load_config(model_dir)
    first, layers, last = layer_bytes(model_dir, config)
    is_client = options.split == "client"
    if is_client:
        first = last = 0
    ends = list(options.ends or _split(first, layers, last, options))
    starts = [0, *ends[:-1]]
    held = NO_ENDS if is_client else None
    files = [
        required_files(model_dir, config, range(start, end), held)
        for start, end in zip(starts, ends, strict=True)
    ]
    own = required_files(model_dir, config, range(0), BOTH_ENDS) if is_client else []
    pins = _pin_once([*files, own], progress)
    if options.stage_keys and len(options.stage_keys) != options.num_stages:
        raise InputError(f"{len(options.stage_keys)} keys for {options.num_stages} stages")
    stages = [
        {
            "stage_idx": idx,
            "layer_start": start,
            "layer_end": end,
            "weight_hashes": [pins[path].digest for path in files[idx]],
            "require_weight_hashes": True,
            "precision": options.precision,
            "kv_bytes": options.kv_bytes,
            "machine_keys": options.stage_keys[idx : idx + 1],
            "endpoint": _endpoint(options, hosts, idx),
        }
        for idx, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    client = {"weight_hashes": [pins[path].digest for path in own], "precision": options.precision}
    fields = {
        "model_name": options.model_name or _label(model_dir),
        "model_version": "1",
        "total_layers": config.num_layers,
        "stages": stages,
        "activation_spec": {
            "dtype": options.wire_dtype,
            "hidden_dim": config.hidden_dim,
            "max_seq_len": config.max_positions,
        },
        "config_hash": hash_config(model_dir),
        "eos_token_ids": config.eos_token_ids,
        "orchestrator_keys": options.orchestrator_keys,
        "split": options.split,
        "client": client if is_client else None,
        "weight_pieces": {key: dict(each) for key, each in pieces_by_hash(pins.values()).items()},
        "dp": options.noise and dict(zip(("sigma", "clip"), options.noise, strict=True)),
        "home_stages": None if options.home_layers is None else {"first": 1, "last": 1},
        "part": options.part and _part(*options.part),
        "encoding": dict(options.encoding) or None,
    }
    return build_manifest(fields, "cannot plan this")


def _split(first: int, layers: Sequence[int], last: int, options: PlanOptions) -> list[int]:
    """End layer of each stage. Raises InputError."""
    if options.home_layers is None:
        return split_layers(first, layers, last, options.num_stages)
    before, behind = options.home_layers
    stop = len(layers) - behind
    if min(before, behind) < 1 or options.num_stages < 3 or before >= stop:
        raise InputError(
            "at least a layer stays at home at each end, in a stage of its own, and at least one "
            f"is between them: give 3 stages or more, and fewer layers than {len(layers)}"
        )
    between = split_layers(0, layers[before:stop], 0, options.num_stages - 2)
    return [before, *(before + end for end in between), len(layers)]


def _part(kind: str, where: Endpoint, public_key: str | None) -> dict[str, Any]:
    address: dict[str, Any]
    match where:
        case TcpEndpoint():
            address = {"type": "tcp", "addr": str(where)}
        case VsockEndpoint(cid, port):
            address = {"type": "vsock", "cid": cid, "port": port}
        case UnixEndpoint(path, port):
            address = {"type": "unix", "path": str(path), "port": port}
    return {"kind": kind, "address": address, "public_key": public_key}


def _label(model_dir: Path) -> str:
    """The directory's name, or the repository's in a hub's cache; file names need not be text."""
    directory = model_dir.resolve()
    if directory.parent.name == "snapshots":
        return directory.parent.parent.name.rpartition("--")[2]
    return directory.name.encode("utf-8", "replace").decode()


def _pin_once(files: Sequence[Sequence[Path]], progress: Progress | None) -> dict[Path, FilePin]:
    distinct = sorted({path for stage_files in files for path in stage_files})
    return dict(zip(distinct, pin_files(distinct, progress), strict=True))


def pieces_by_hash(pins: Iterable[FilePin]) -> dict[str, PiecesSpec]:
    """What a manifest says of the pieces of files that have several."""
    return {
        pin.digest: PiecesSpec(
            file_bytes=pin.pieces.file_bytes,
            piece_bytes=pin.pieces.piece_bytes,
            hashes=pin.pieces.hashes,
        )
        for pin in pins
        if pin.pieces is not None
    }


def _hosts(options: PlanOptions) -> list[str]:
    """Each stage's host, and the one to which results come."""
    given, num_stages = list(options.hosts), options.num_stages
    if len(given) == 1:
        return given * (num_stages + 1)
    if options.in_enclaves:
        raise InputError(f"{len(given)} hosts are given; enclaves have one parent, so give one")
    if len(given) not in (num_stages, num_stages + 1):
        raise InputError(
            f"{len(given)} hosts are given for {num_stages} stages; give one for all, or one for "
            "each, and after those the orchestrator's if it has its own"
        )
    return [*given, given[-1]][: num_stages + 1]


def _endpoint(options: PlanOptions, hosts: Sequence[str], idx: int) -> dict[str, Any]:
    def address(port: int, stage: int = idx) -> dict[str, Any]:
        host = f"[{hosts[stage]}]" if ":" in hosts[stage] else hosts[stage]
        return {"type": "tcp", "addr": f"{host}:{port}"}

    def vsock(cid: int, port: int) -> dict[str, Any]:
        return {"type": "vsock", "cid": cid, "port": port}

    if options.in_enclaves:
        return {
            "control": address(options.base_port + 2 * idx),
            "data_in": vsock(FIRST_CID + idx, DATA_PORT) if idx else address(options.base_port + 1),
            "data_out": vsock(PARENT_CID, RELAY_PORT + idx),
        }
    port = options.base_port + 10 * idx
    return {
        "control": address(port),
        "data_in": address(port + 1),
        # The next stage's data_in; after the last stage, where the orchestrator listens.
        "data_out": address(port + 11, idx + 1),
    }
