"""Cutting a model into stages: each one's own weights, configuration and manifest core."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.agreement.manifest import ClientSpec, Manifest, StageSpec, dump_manifest
from pipeline.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    STORED_DTYPES,
    ArrayDType,
    HostArray,
    Precision,
)
from pipeline.errors import InputError, ManifestError, ModelError
from pipeline.files import is_file
from pipeline.models.base import BOTH_ENDS, NO_ENDS, Ends
from pipeline.models.config import CONFIG_FILE, GENERATION_CONFIG_FILE, load_config, read_config
from pipeline.models.older_client_part import CLIENT_FILE
from pipeline.models.registry import in_older_layout, required_tensors
from pipeline.planning.plan import CONTROL_PORT, DATA_PORT
from pipeline.progress import Progress, part_of
from pipeline.weights.checkpoint import (
    StoredTensor,
    hash_files,
    load_tensors,
    stored_tensors,
)
from pipeline.weights.checkpoint_index import SINGLE_FILE
from pipeline.weights.quantization import SCALE_SUFFIX, num_groups
from pipeline.weights.tensor_sinks import FLOATS, CopySink, Sink, WeightSink

MANIFEST_FILE = "manifest.json"
RUN_FILE = "run.json"
CLIENT_DIRECTORY = "client"
# What of a model the user's end reads beside its weights, where it is there.
TEXT_FILES = (
    GENERATION_CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Where an enclave finds the directory written here.
STAGE_ROOT = "/stage"
HEADER_ALIGNMENT = 8  # of a safetensors file, so that its tensors are aligned


class _Part(NamedTuple):
    """What a directory holds of the model, and what the manifest says of its weights."""

    layers: range
    ends: Ends | None
    precision: Precision | None
    weight_hashes: tuple[str, ...] = ()


def _stage_part(manifest: Manifest, stage: StageSpec) -> _Part:
    layers = range(stage.layer_start, stage.layer_end)
    ends = NO_ENDS if manifest.has_client_ends else None
    return _Part(layers, ends, stage.precision, stage.weight_hashes)


def cut_model(
    manifest: Manifest,
    model_dir: Path,
    output: Path,
    precision: Precision | None = None,
    progress: Progress | None = None,
    *,
    in_one_file: bool = False,
) -> Manifest:
    """Write `output`/stageI for every stage, and `output`/manifest.json that pins those shards.

    Where the orchestrator holds the ends of the model, `output`/client has those: a model directory
    with tokenizer and template, or with `in_one_file` its weights in the older layout.

    A shard holds its weights as its stage will compute with them: in `precision`, which the new
    manifest then pins, or in what the manifest pins already, or unchanged. The source is held
    against the manifest's hashes where it has any. Returns the new manifest. Raises ModelError,
    InputError; nothing is left behind then.
    """
    if precision is not None:
        manifest = _in_precision(manifest, precision)
    if in_one_file and not manifest.has_client_ends:
        raise InputError("--client-file: the manifest's split is stages, so no client has a part")
    num_parts = len(manifest.stages) + manifest.has_client_ends
    with _new_directory(output) as directory:
        stages = []
        for stage in manifest.stages:
            path = directory / f"stage{stage.stage_idx}"
            path.mkdir()
            digest = _write_weights(
                manifest, _stage_part(manifest, stage), model_dir, path / SINGLE_FILE,
                part_of(progress, stage.stage_idx, num_parts),
            )  # fmt: skip
            pins = {"weight_hashes": (digest,), "require_weight_hashes": True}
            stages.append(stage.model_copy(update=pins))
        client = _write_client(
            manifest, model_dir, directory, part_of(progress, len(stages), num_parts),
            in_one_file=in_one_file,
        )  # fmt: skip
        config_hash = hashlib.sha256(read_config(model_dir)).hexdigest()
        pinned = manifest.model_copy(
            update={"stages": tuple(stages), "config_hash": config_hash, "client": client}
        )
        for stage in stages:
            _write_rest(pinned, stage, model_dir, directory / f"stage{stage.stage_idx}")
        (directory / MANIFEST_FILE).write_text(dump_manifest(pinned))
    return pinned


def _in_precision(manifest: Manifest, precision: Precision) -> Manifest:
    """The manifest with all its weights in that."""
    pins = {"precision": precision}
    stages = tuple(stage.model_copy(update=pins) for stage in manifest.stages)
    client = manifest.client and manifest.client.model_copy(update=pins)
    return manifest.model_copy(update={"stages": stages, "client": client})


def cut_stage(
    manifest: Manifest,
    stage_idx: int,
    model_dir: Path,
    output: Path,
    progress: Progress | None = None,
) -> None:
    """Write one stage's directory of a manifest that `cut_model` has pinned.

    Raises ModelError, InputError, and ManifestError when the shard is not the one the manifest
    pins: every stage carries the hashes of all, so they have to be known before the first image
    is built.
    """
    stage = manifest.stage(stage_idx)
    with _new_directory(output) as directory:
        part = _stage_part(manifest, stage)._replace(weight_hashes=())
        digest = _write_weights(manifest, part, model_dir, directory / SINGLE_FILE, progress)
        if stage.weight_hashes != (digest,):
            raise ManifestError(
                f"the manifest pins {', '.join(stage.weight_hashes) or 'nothing'} for stage "
                f"{stage_idx}, its shard is {digest}; `pipeline-orch shard` without --stage "
                "writes a manifest that pins shards"
            )
        _write_rest(manifest, stage, model_dir, directory)


def _write_client(
    manifest: Manifest,
    model_dir: Path,
    directory: Path,
    progress: Progress | None,
    *,
    in_one_file: bool,
) -> ClientSpec | None:
    """Write the orchestrator's own part, if it has one; what pins it."""
    client = manifest.client
    if client is None:
        return None
    directory /= CLIENT_DIRECTORY
    directory.mkdir()
    part = _Part(range(0), BOTH_ENDS, client.precision, client.weight_hashes)
    path = directory / (CLIENT_FILE if in_one_file else SINGLE_FILE)
    digest = _write_weights(manifest, part, model_dir, path, progress)
    (directory / CONFIG_FILE).write_bytes(read_config(model_dir))
    for name in TEXT_FILES:
        if is_file(model_dir / name):
            shutil.copyfile(model_dir / name, directory / name)
    return client.model_copy(update={"weight_hashes": (digest,)})


def _write_weights(
    manifest: Manifest, part: _Part, model_dir: Path, path: Path, progress: Progress | None
) -> str:
    """Write a part's tensors in its precision to `path`; returns the file's SHA-256."""
    config = load_config(model_dir, manifest.config_hash)
    if config.num_layers != manifest.total_layers:
        raise ManifestError(
            f"the manifest covers {manifest.total_layers} layers, {model_dir} has "
            f"{config.num_layers}"
        )
    stored = stored_tensors(model_dir)
    planned = required_tensors(model_dir, config, part.layers, part.ends)
    kept = {
        name: _keep(stored[name], sink, part.precision, model_dir)
        for name, sink in planned.items()
        if name in stored  # load_tensors names what is missing
    }
    sinks = {**planned, **{name: each.sink for name, each in kept.items()}}
    expected = part.weight_hashes or None
    load_tensors(model_dir, sinks, expected_hashes=expected, progress=progress)
    tensors = {name: tensor for each in kept.values() for name, tensor in each.tensors().items()}
    if path.name == CLIENT_FILE:
        tensors = in_older_layout(config, tensors)
    _save(tensors, path)
    return hash_files([path])[0]


def _save(tensors: Mapping[str, HostArray], path: Path) -> None:
    """Write a safetensors file, as the library of that name does: wide formats first, by name."""
    names = {dtype: name for name, dtype in STORED_DTYPES.items()}
    order = (FLOAT32, BFLOAT16, FLOAT16, INT8)
    sorted_tensors = sorted(tensors.items(), key=lambda each: (order.index(each[1].dtype), each[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted_tensors:
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, tensor in sorted_tensors:
            file.write(tensor.data)


class _Kept:
    """A tensor on its way into a shard: as stored, or rounded to another float."""

    def __init__(self, stored: StoredTensor, dtype: ArrayDType) -> None:
        self._name = stored.name
        self.sink: Sink = CopySink(np.empty(stored.shape, dtype), dtype)

    def tensors(self) -> Mapping[str, HostArray]:
        """What the shard stores, by name."""
        assert isinstance(self.sink, CopySink)
        return {self._name: self.sink.target}


class _KeptInt8:
    """A matrix on its way into a shard as int8, in the layout it came in."""

    precision: Precision = "int8"

    def __init__(self, stored: StoredTensor, *, is_in_out: bool) -> None:
        rows, columns = stored.shape
        num_out, num_in = (columns, rows) if is_in_out else (rows, columns)
        self._name = stored.name
        self._values = np.empty((num_out, num_in), INT8)
        self._scales = np.empty((num_out, num_groups(num_in)), BFLOAT16)
        self._is_in_out = is_in_out
        self.sink: Sink = WeightSink(self, 0, num_out, num_in, is_in_out=is_in_out)

    def put(self, first: int, outputs: HostArray, scales: HostArray | None) -> None:
        """Keep outputs first.. and their scales."""
        assert scales is not None, "int8 comes with scales"
        last = first + len(outputs)
        self._values[first:last], self._scales[first:last] = outputs, scales

    def tensors(self) -> Mapping[str, HostArray]:
        """What the shard stores, by name."""
        values = np.ascontiguousarray(self._values.T) if self._is_in_out else self._values
        return {self._name: values, self._name + SCALE_SUFFIX: self._scales}


def _keep(
    stored: StoredTensor, planned: Sink, precision: Precision | None, model_dir: Path
) -> _Kept | _KeptInt8:
    """Where a tensor of the source goes; float32 is kept as stored, being no less exact so."""
    if stored.dtype not in FLOATS:
        raise ModelError(
            f"{model_dir}: tensor {stored.name} is stored as {stored.dtype}: "
            f"use weights in one of {', '.join(FLOATS)}"
        )
    dtype = STORED_DTYPES[stored.dtype]
    try:
        if isinstance(planned, WeightSink) and len(stored.shape) == 2:
            if precision == "int8":
                return _KeptInt8(stored, is_in_out=planned.is_in_out)
            if precision == "bfloat16":
                dtype = BFLOAT16
        return _Kept(stored, dtype)
    except (ValueError, MemoryError) as error:
        raise ModelError(
            f"{model_dir}: tensor {stored.name} needs {stored.end - stored.start} bytes of memory, "
            "more than this machine gives"
        ) from error


def _write_rest(manifest: Manifest, stage: StageSpec, model_dir: Path, directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(read_config(model_dir))
    core = json.dumps(manifest.core(), indent=2, sort_keys=True)
    (directory / MANIFEST_FILE).write_text(core + "\n")
    (directory / RUN_FILE).write_text(json.dumps({"argv": _enclave_command(stage)}) + "\n")


def _enclave_command(stage: StageSpec) -> list[str]:
    """What an enclave's init runs; measured with the rest of the stage's files."""
    return [
        *("/usr/bin/python3", "-IB", "-m", "pipeline.cli.stage_worker"),
        *("--manifest", f"{STAGE_ROOT}/{MANIFEST_FILE}"),
        *("--stage-idx", str(stage.stage_idx)),
        *("--model-dir", STAGE_ROOT),
        *("--control-listen", f"vsock:any:{CONTROL_PORT}"),
        *("--data-in-listen", f"vsock:any:{DATA_PORT}"),
    ]


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory that appears as `output` when its content is complete, or not at all."""
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise InputError(f"{output} exists and is not an empty directory; choose another")
        output.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from error
    try:
        yield directory
        directory.chmod(0o755)
        directory.replace(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
