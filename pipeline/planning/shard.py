"""Cutting a model into stages: each one's own weights, configuration and manifest core."""

import hashlib
import json
from pathlib import Path

from pipeline.agreement.manifest import ClientSpec, Manifest, StageSpec, dump_manifest
from pipeline.codecs.secret_rotation import SecretRotation
from pipeline.dtypes import Precision
from pipeline.errors import InputError, ManifestError
from pipeline.files import new_directory
from pipeline.gguf.model_files import has_model_file, read_model_file
from pipeline.models.config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    hash_config,
    load_config,
)
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.model_config import ModelConfig
from pipeline.models.older_client_part import CLIENT_FILE
from pipeline.models.registry import in_older_layout
from pipeline.planning.part_weights import Part, Source, part_tensors, save_tensors
from pipeline.planning.plan import CONTROL_PORT, DATA_PORT
from pipeline.progress import Progress, part_of
from pipeline.weights.checkpoint_index import SINGLE_FILE

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
MAX_TEXT_BYTES = 1 << 28
# Where an enclave finds the directory written here.
STAGE_ROOT = "/stage"


def _stage_part(manifest: Manifest, stage: StageSpec) -> Part:
    layers = range(stage.layer_start, stage.layer_end)
    ends = NO_ENDS if manifest.has_client_ends else None
    return Part(layers, ends, stage.precision, stage.weight_hashes, manifest.weight_pieces)


def cut_model(
    manifest: Manifest,
    model_dir: Path,
    output: Path,
    precision: Precision | None = None,
    progress: Progress | None = None,
    *,
    in_one_file: bool = False,
    rotation: SecretRotation | None = None,
) -> Manifest:
    """Write `output`/stageI for every stage, and `output`/manifest.json that pins those shards.

    Beside them go config.json, tokenizer and template, so that `output` stands for the model. Where
    the orchestrator holds its ends, `output`/client has those files and the ends' weights, with
    `in_one_file` in the older layout.

    A shard holds its weights as its stage will compute with them: in `precision`, which the new
    manifest then pins, or in what the manifest pins already, or unchanged. With `rotation` all of
    them have that in them, in float32 unless a precision says else, and the new manifest names it.
    The source is held against the manifest's hashes where it has any. Returns the new manifest.
    Raises ModelError, InputError; nothing is left behind then.
    """
    if manifest.rotation is not None:
        raise InputError("the manifest is of rotated shards; cut the model by its plain manifest")
    if rotation is not None and not manifest.has_client_ends:
        raise InputError(
            "a secret rotation is for manifests whose split is client, since stages that embed "
            "tokens see them; `pipeline-orch plan --split client` writes one"
        )
    if precision is not None:
        manifest = _in_precision(manifest, precision)
    if in_one_file and not manifest.has_client_ends:
        raise InputError("--client-file: the manifest's split is stages, so no client has a part")
    source = Source(model_dir, rotation, is_unpacked=_is_unpacked(manifest))
    config = _source_config(manifest, source)
    num_parts = len(manifest.stages) + manifest.has_client_ends
    with new_directory(output) as directory:
        stages = []
        for stage in manifest.stages:
            path = directory / f"stage{stage.stage_idx}"
            path.mkdir()
            digest = _write_weights(
                source, config, _stage_part(manifest, stage), path / SINGLE_FILE,
                part_of(progress, stage.stage_idx, num_parts),
            )  # fmt: skip
            pins = {"weight_hashes": (digest,), "require_weight_hashes": True}
            stages.append(stage.model_copy(update=pins))
        client = _write_client(
            source, config, manifest, directory, part_of(progress, len(stages), num_parts),
            in_one_file=in_one_file,
        )  # fmt: skip
        pins = {
            "weight_pieces": {},  # whose shard it is reads all of it
            "stages": tuple(stages),
            "client": client,
            "config_hash": _sha256(source.config_json()),
            "rotation": rotation and rotation.fingerprint,
        }
        pinned = manifest.model_copy(update=pins)
        if client is None:
            _write_text_files(source, directory)
        for stage in stages:
            _write_rest(pinned, stage, source, directory / f"stage{stage.stage_idx}")
        (directory / MANIFEST_FILE).write_text(dump_manifest(pinned))
    return pinned


def _in_precision(manifest: Manifest, precision: Precision) -> Manifest:
    """The manifest with all its weights in that."""
    pins = {"precision": precision}
    stages = tuple(stage.model_copy(update=pins) for stage in manifest.stages)
    client = manifest.client and manifest.client.model_copy(update=pins)
    return manifest.model_copy(update={"stages": stages, "client": client})


def _is_unpacked(manifest: Manifest) -> bool:
    """Whether each part is in a precision that packed weights have to become."""
    precisions = {stage.precision for stage in manifest.stages}
    if manifest.client is not None:
        precisions.add(manifest.client.precision)
    return precisions <= {"bfloat16", "int8", "int4"}


def cut_stage(
    manifest: Manifest,
    stage_idx: int,
    model_dir: Path,
    output: Path,
    progress: Progress | None = None,
    rotation: SecretRotation | None = None,
) -> None:
    """Write one stage's directory of a manifest that `cut_model` has pinned.

    Raises ModelError, InputError, and ManifestError when the shard is not the one the manifest
    pins: every stage carries the hashes of all, so they have to be known before the first image
    is built.
    """
    stage = manifest.stage(stage_idx)
    source = Source(model_dir, rotation, is_unpacked=_is_unpacked(manifest))
    if manifest.rotation != (rotation and rotation.fingerprint):
        raise InputError(
            "the manifest's shards are not rotated, and a secret is given"
            if manifest.rotation is None
            else "the manifest's shards are rotated by a secret; give it with --rotate-secret"
            if rotation is None
            else "the manifest's shards are rotated by another secret than the one given"
        )
    config = _source_config(manifest, source)
    with new_directory(output) as directory:
        part = _stage_part(manifest, stage)._replace(weight_hashes=())
        digest = _write_weights(source, config, part, directory / SINGLE_FILE, progress)
        if stage.weight_hashes != (digest,):
            raise ManifestError(
                f"the manifest pins {', '.join(stage.weight_hashes) or 'nothing'} for stage "
                f"{stage_idx}, its shard is {digest}; `pipeline-orch shard` without --stage "
                "writes a manifest that pins shards"
            )
        _write_rest(manifest, stage, source, directory)


def _write_client(
    source: Source,
    config: ModelConfig,
    manifest: Manifest,
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
    part = Part(range(0), BOTH_ENDS, client.precision, client.weight_hashes, manifest.weight_pieces)
    path = directory / (CLIENT_FILE if in_one_file else SINGLE_FILE)
    digest = _write_weights(source, config, part, path, progress)
    if source.rotation is not None:  # whose secret this part gives away
        directory.chmod(0o700)
    _write_text_files(source, directory)
    return client.model_copy(update={"weight_hashes": (digest,)})


def _write_text_files(source: Source, directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(source.config_json())
    for name in TEXT_FILES:
        if has_model_file(source.model_dir / name):
            raw = read_model_file(source.model_dir / name, MAX_TEXT_BYTES)
            (directory / name).write_bytes(raw)


def _write_weights(
    source: Source, config: ModelConfig, part: Part, path: Path, progress: Progress | None
) -> str:
    """Write a part's tensors in its precision to `path`; returns the file's SHA-256."""
    tensors = part_tensors(source, config, part, progress)
    if path.name == CLIENT_FILE:
        tensors = in_older_layout(config, tensors)
    return save_tensors(tensors, path)


def _source_config(manifest: Manifest, source: Source) -> ModelConfig:
    """The source's configuration, if it is the one that the manifest is of.

    Raises ModelError, ManifestError.
    """
    expected = manifest.config_hash
    if expected == _sha256(source.config_json()):
        expected = hash_config(source.model_dir)
    config = load_config(source.model_dir, expected)
    if config.num_layers != manifest.total_layers:
        raise ManifestError(
            f"the manifest covers {manifest.total_layers} layers, {source.model_dir} has "
            f"{config.num_layers}"
        )
    if config.hidden_dim != manifest.activation_spec.hidden_dim:
        raise ManifestError(
            f"the manifest's hidden_dim is {manifest.activation_spec.hidden_dim}, "
            f"{source.model_dir} has {config.hidden_dim}"
        )
    return config


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_rest(manifest: Manifest, stage: StageSpec, source: Source, directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(source.config_json())
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
