"""What a model directory's config.json says, checked, whichever family it is of."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ModelError
from pipeline.files import is_file
from pipeline.gguf import model_files
from pipeline.gguf.model_files import SUFFIX, has_model_file, read_model_file
from pipeline.models.families import FAMILIES, why_missing
from pipeline.models.model_config import ModelConfig, shown
from pipeline.weights.packings.choice import read_quantization, stays_packed

CONFIG_FILE = model_files.CONFIG_FILE
GENERATION_CONFIG_FILE = "generation_config.json"
MAX_CONFIG_BYTES = (
    4 << 20
)  # real ones are a few KiB; this bounds what a swapped file makes us parse


def load_config(model_dir: Path, expected_hash: str | None = None) -> ModelConfig:
    """Read `model_dir`/config.json, with the end tokens of generation_config.json if there is one.

    `expected_hash`: SHA-256 of config.json as hex, held against the very bytes that are used, so
    that a host cannot show one file and serve another.

    Raises ModelError naming the file, the field and the value that cannot be served.
    """
    path = model_dir / CONFIG_FILE
    raw = read_config(model_dir)
    if expected_hash is not None and hashlib.sha256(raw).hexdigest() != expected_hash:
        raise ModelError(
            f"{path} has SHA-256 {hashlib.sha256(raw).hexdigest()}, the manifest pins "
            f"{expected_hash}: fetch the model again, or plan a manifest for this one"
        )
    generation_path = model_dir / GENERATION_CONFIG_FILE
    generation = _read_json(generation_path) if has_model_file(generation_path) else {}
    return parse_config(raw, generation, path)


def parse_config(raw: bytes, generation: dict[str, Any], path: Path) -> ModelConfig:
    """The configuration in `raw`, with the end tokens of `generation`. Raises ModelError."""
    fields = _parse_json(path, raw)
    try:
        model_type = fields.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ModelError(
                f"{path}: model_type {shown(model_type)} is not supported: "
                f"{why_missing(model_type)}"
            )
        return replace(
            family.read(fields, generation),
            rotation=fields.get("residual_rotation"),
            packing=read_quantization(fields.get("quantization_config")),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        # Where a field is missing, its input is everything else there is.
        found = "" if first["type"] == "missing" else f"={shown(first['input'])} cannot be served"
        raise ModelError(f"{path}: {field}{found}: {first['msg']}") from error


def as_rotated(config: ModelConfig, fingerprint: str) -> ModelConfig:
    """The configuration of the model with that rotation in its weights: its head is its own."""
    return replace(config, rotation=fingerprint, tie_word_embeddings=False)


def rotated_json(raw: bytes, fingerprint: str) -> bytes:
    """The config.json that becomes `as_rotated` of what `raw` becomes."""
    fields = json.loads(raw) | {"residual_rotation": fingerprint, "tie_word_embeddings": False}
    return (json.dumps(fields, indent=2) + "\n").encode()


def unpacked_json(raw: bytes, path: Path) -> bytes:
    """The config.json of the model whose weights are packed no more; itself if none were, or stay.

    Raises ModelError naming `path`, which has `raw`.
    """
    fields = _parse_json(path, raw)
    try:
        packing = read_quantization(fields.get("quantization_config"))
    except ValueError as error:
        raise ModelError(f"{path}: quantization_config: {error}") from error
    if packing is None or stays_packed(packing):
        return raw
    del fields["quantization_config"]
    return (json.dumps(fields, indent=2) + "\n").encode()


def hash_config(model_dir: Path) -> str:
    """SHA-256 of config.json as hex, what `load_config` compares. Raises ModelError."""
    return hashlib.sha256(read_config(model_dir)).hexdigest()


def read_config(model_dir: Path) -> bytes:
    """The bytes of config.json. Raises ModelError."""
    return _read_bytes(model_dir / CONFIG_FILE, _why_no_model(model_dir))


def _why_no_model(path: Path) -> str:
    if is_file(path):
        return f"{path} is no model: of files, those are read whose names end with {SUFFIX}"
    if path.suffix == SUFFIX:
        return f"there is no file {path}"
    return (
        f"no {CONFIG_FILE} in {path}: is it a model directory? "
        "By name a model is found once it has been fetched: pipeline-orch pull"
    )


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_json(path, _read_bytes(path))


def _read_bytes(path: Path, missing: str = "") -> bytes:
    try:
        raw = read_model_file(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise ModelError(missing or f"cannot read {path}: {error.strerror}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ModelError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: not a configuration")
    return raw


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): fetch the model again") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} holds a {type(fields).__name__}, not an object: fetch it again")
    return fields
