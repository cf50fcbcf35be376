"""What a model directory's config.json says, checked; field names are config.json's keys."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from pipeline.errors import ModelError
from pipeline.gguf.model_files import has_model_file, read_model_file
from pipeline.models.rope_config import Positions, RopeScaling, Scale, read_rope
from pipeline.weights.packings.choice import Finder, read_quantization

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
MAX_CONFIG_BYTES = (
    4 << 20
)  # real ones are a few KiB; this bounds what a swapped file makes us parse
MAX_LAYERS = 4096

# Well above every published model, and so low that no product of them leaves 63 bits: a config.json
# of absurd sizes is refused by name, not by whatever fails first inside.
Width = Annotated[int, Field(gt=0, le=1 << 20)]
Inner = Annotated[int, Field(gt=0, le=1 << 22)]
Heads = Annotated[int, Field(gt=0, le=1 << 14)]
HeadDim = Annotated[int, Field(gt=0, le=1 << 14)]
Vocabulary = Annotated[int, Field(gt=0, le=1 << 24)]
Epsilon = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What every family has in common."""

    architecture: str
    num_layers: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    intermediate_size: int
    norm_eps: float
    tie_word_embeddings: bool
    # Fingerprint of the secret rotation in the weights, if any (planning/rotated_weights.py).
    rotation: str | None = None
    # How other programs packed the weights in files, if they did.
    packing: Finder | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config(ModelConfig):
    """GPT-2: learned positions, LayerNorm, one activation between two linears."""

    activation_function: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Llama and its relatives: rotary positions, RMSNorm, gated MLP, grouped KV heads."""

    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    sliding_window: int | None


Packed = Annotated[Any, AfterValidator(read_quantization)]


class JsonFields(BaseModel):
    """What is read of every config.json, and refused."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, protected_namespaces=(), defer_build=True
    )

    vocab_size: Vocabulary
    eos_token_id: int | list[int] | None = None
    quantization_config: Packed = None
    residual_rotation: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None


class _GPT2Json(JsonFields):
    model_type: Literal["gpt2"]
    n_layer: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    n_embd: Width
    n_head: Heads
    n_positions: Positions
    n_inner: Inner | None = None
    layer_norm_epsilon: Epsilon = 1e-5
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"] = "gelu_new"
    tie_word_embeddings: bool = True
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False


class _LlamaJson(JsonFields):
    model_type: Literal["llama", "mistral", "qwen2"]
    num_hidden_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    hidden_size: Width
    intermediate_size: Inner
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: HeadDim | None = None
    max_position_embeddings: Positions
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Scale | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    hidden_act: Literal["silu"] = "silu"
    original_max_position_embeddings: Positions | None = None
    partial_rotary_factor: Literal[1] | None = None
    layer_types: list[str] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Positions | None = None
    use_sliding_window: bool = False
    tie_word_embeddings: bool = False


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
        read = READERS.get(model_type) if isinstance(model_type, str) else None
        if read is None:
            *others, last = READERS
            raise ModelError(
                f"{path}: model_type {_shown(model_type)} is not supported: "
                f"use a {', '.join(others)} or {last} model"
            )
        return replace(
            read(fields, generation),
            rotation=fields.get("residual_rotation"),
            packing=read_quantization(fields.get("quantization_config")),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        # Where a field is missing, its input is everything else there is.
        found = "" if first["type"] == "missing" else f"={_shown(first['input'])} cannot be served"
        raise ModelError(f"{path}: {field}{found}: {first['msg']}") from error


def _shown(value: object) -> str:
    return repr(value)[:80]


def as_rotated(config: ModelConfig, fingerprint: str) -> ModelConfig:
    """The configuration of the model with that rotation in its weights: its head is its own."""
    return replace(config, rotation=fingerprint, tie_word_embeddings=False)


def rotated_json(raw: bytes, fingerprint: str) -> bytes:
    """The config.json that becomes `as_rotated` of what `raw` becomes."""
    fields = json.loads(raw) | {"residual_rotation": fingerprint, "tie_word_embeddings": False}
    return (json.dumps(fields, indent=2) + "\n").encode()


def unpacked_json(raw: bytes, path: Path) -> bytes:
    """The config.json of the model whose weights are packed no more; itself if none were.

    Raises ModelError naming `path`, which has `raw`.
    """
    fields = _parse_json(path, raw)
    if fields.get("quantization_config") is None:
        return raw
    del fields["quantization_config"]
    return (json.dumps(fields, indent=2) + "\n").encode()


def hash_config(model_dir: Path) -> str:
    """SHA-256 of config.json as hex, what `load_config` compares. Raises ModelError."""
    return hashlib.sha256(read_config(model_dir)).hexdigest()


def read_config(model_dir: Path) -> bytes:
    """The bytes of config.json. Raises ModelError."""
    missing = (
        f"no {CONFIG_FILE} in {model_dir}: is it a model directory? "
        "By name a model is found once it has been fetched: pipeline-orch pull"
    )
    return _read_bytes(model_dir / CONFIG_FILE, missing)


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


def eos_token_ids_of(*values: object) -> tuple[int, ...]:
    """Every end token that any of these fields names."""
    found: set[int] = set()
    for value in values:
        candidates = value if isinstance(value, list) else [value]
        found.update(each for each in candidates if type(each) is int and each >= 0)
    return tuple(sorted(found))


def _head_dim(hidden: int, num_heads: int, names: str) -> int:
    if hidden % num_heads:
        raise ModelError(f"config.json: {names} is {hidden}/{num_heads}, not a whole number")
    return hidden // num_heads


def _gpt2(fields: Fields, generation: Fields) -> GPT2Config:
    raw = _GPT2Json.model_validate(fields)
    return GPT2Config(
        architecture=raw.model_type,
        num_layers=raw.n_layer,
        hidden_dim=raw.n_embd,
        num_heads=raw.n_head,
        num_kv_heads=raw.n_head,
        head_dim=_head_dim(raw.n_embd, raw.n_head, "n_embd/n_head"),
        vocab_size=raw.vocab_size,
        max_positions=raw.n_positions,
        eos_token_ids=eos_token_ids_of(raw.eos_token_id, generation.get("eos_token_id")),
        intermediate_size=raw.n_inner or 4 * raw.n_embd,
        norm_eps=raw.layer_norm_epsilon,
        tie_word_embeddings=raw.tie_word_embeddings,
        activation_function=raw.activation_function,
    )


def _llama(fields: Fields, generation: Fields) -> LlamaConfig:
    raw = _LlamaJson.model_validate(fields)
    if raw.model_type == "qwen2" and raw.use_sliding_window:
        raise ModelError("config.json: use_sliding_window=true is not supported for qwen2")
    if len(set(raw.layer_types or ())) > 1:
        raise ModelError(
            f"config.json: layer_types={_shown(sorted(set(raw.layer_types or ())))} is not "
            "supported: layers of one type are"
        )
    num_heads = raw.num_attention_heads
    num_kv_heads = raw.num_key_value_heads or num_heads
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    head_dim = raw.head_dim or _head_dim(
        raw.hidden_size, num_heads, "hidden_size/num_attention_heads"
    )
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim={head_dim} is odd; rotary positions need pairs")
    rope = read_rope(
        (raw.rope_parameters, raw.rope_scaling),
        raw.rope_theta,
        max_positions=raw.max_position_embeddings,
        original_positions=raw.original_max_position_embeddings,
    )
    is_qwen2 = raw.model_type == "qwen2"
    return LlamaConfig(
        architecture=raw.model_type,
        num_layers=raw.num_hidden_layers,
        hidden_dim=raw.hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=raw.vocab_size,
        max_positions=rope.max_positions,
        eos_token_ids=eos_token_ids_of(raw.eos_token_id, generation.get("eos_token_id")),
        intermediate_size=raw.intermediate_size,
        norm_eps=raw.rms_norm_eps,
        tie_word_embeddings=raw.tie_word_embeddings,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        qkv_bias=is_qwen2 or (raw.model_type == "llama" and raw.attention_bias),
        output_bias=raw.model_type == "llama" and raw.attention_bias,
        mlp_bias=raw.model_type == "llama" and raw.mlp_bias,
        sliding_window=raw.sliding_window if raw.model_type == "mistral" else None,
    )


# What reads config.json (and generation_config.json's fields) of a model_type. Raises ModelError,
# and pydantic's ValidationError.
READERS: dict[str, Callable[[Fields, Fields], ModelConfig]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
}
