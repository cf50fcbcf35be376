"""Cutting a model into stages: each one's own weights, configuration and manifest core."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.errors import InputError, ManifestError, ModelError
from pipeline.manifest import Manifest, StageSpec, dump_manifest
from pipeline.models.config import CONFIG_FILE, load_config, read_config
from pipeline.models.registry import required_tensors
from pipeline.models.weights import (
    LOADABLE,
    SINGLE_FILE,
    StoredTensor,
    hash_files,
    load_tensors,
    stored_tensors,
)
from pipeline.plan import CONTROL_PORT, DATA_PORT

MANIFEST_FILE = "manifest.json"
RUN_FILE = "run.json"
# Where an enclave finds the directory written here.
STAGE_ROOT = "/stage"


def cut_model(manifest: Manifest, model_dir: Path, output: Path) -> Manifest:
    """Write `output`/stageI for every stage, and `output`/manifest.json that pins those shards.

    The source is held against the manifest's hashes where it has any. Returns the new manifest.
    Raises ModelError, InputError; nothing is left behind then.
    """
    with _new_directory(output) as directory:
        stages = []
        for stage in manifest.stages:
            path = directory / f"stage{stage.stage_idx}"
            path.mkdir()
            digest = _write_weights(manifest, stage, model_dir, path, stage.weight_hashes or None)
            update = {"weight_hashes": (digest,), "require_weight_hashes": True}
            stages.append(stage.model_copy(update=update))
        config_hash = hashlib.sha256(read_config(model_dir)).hexdigest()
        update = {"stages": tuple(stages), "config_hash": config_hash}
        pinned = manifest.model_copy(update=update)
        for stage in stages:
            _write_rest(pinned, stage, model_dir, directory / f"stage{stage.stage_idx}")
        (directory / MANIFEST_FILE).write_text(dump_manifest(pinned))
    return pinned


def cut_stage(manifest: Manifest, stage_idx: int, model_dir: Path, output: Path) -> None:
    """Write one stage's directory of a manifest that `cut_model` has pinned.

    Raises ManifestError when the shard is not the one the manifest pins: every stage carries the
    hashes of all, so they have to be known before the first image is built.
    """
    stage = manifest.stage(stage_idx)
    with _new_directory(output) as directory:
        digest = _write_weights(manifest, stage, model_dir, directory, None)
        if stage.weight_hashes != (digest,):
            raise ManifestError(
                f"the manifest pins {', '.join(stage.weight_hashes) or 'nothing'} for stage "
                f"{stage_idx}, its shard is {digest}; `pipeline-orch shard` without --stage "
                "writes a manifest that pins shards"
            )
        _write_rest(manifest, stage, model_dir, directory)


def _write_weights(
    manifest: Manifest,
    stage: StageSpec,
    model_dir: Path,
    directory: Path,
    expected_hashes: Sequence[str] | None,
) -> str:
    """Write the stage's tensors as stored; returns the file's SHA-256."""
    config = load_config(model_dir, manifest.config_hash)
    if config.num_layers != manifest.total_layers:
        raise ManifestError(
            f"the manifest covers {manifest.total_layers} layers, {model_dir} has "
            f"{config.num_layers}"
        )
    stored = stored_tensors(model_dir)
    names = required_tensors(model_dir, config, range(stage.layer_start, stage.layer_end))
    tensors = {
        name: _empty_like(stored[name], model_dir)
        for name in names
        if name in stored  # load_tensors names what is missing
    }
    load_tensors(model_dir, tensors, expected_hashes=expected_hashes)
    path = directory / SINGLE_FILE
    save_file(tensors, path, metadata={"format": "pt"})
    return hash_files([path])[0]


def _empty_like(stored: StoredTensor, model_dir: Path) -> torch.Tensor:
    if stored.dtype not in LOADABLE:
        raise ModelError(
            f"{model_dir}: tensor {stored.name} is stored as {stored.dtype}: "
            f"use weights in one of {', '.join(LOADABLE)}"
        )
    try:
        return torch.empty(stored.shape, dtype=LOADABLE[stored.dtype])
    except (RuntimeError, MemoryError) as error:
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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not an empty directory; choose another")
    try:
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
