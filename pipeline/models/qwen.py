"""Qwen 2 and 3: biases of queries, keys and values, or norms of queries and keys; and experts."""

from dataclasses import replace

from pydantic import AliasChoices, Field

from pipeline.models.decoder import NAMES, STREAM, DecoderShard
from pipeline.models.decoder_config import (
    DecoderConfig,
    DecoderJson,
    Experts,
    all_or_none,
    decoder_config,
    layers_of,
    rope_of,
)
from pipeline.models.family import Family
from pipeline.models.model_config import Fields, HeadDim, Heads, Inner, NumExperts
from pipeline.models.rope_config import Positions


class QwenJson(DecoderJson):
    """The config.json of any of them."""

    sliding_window: Positions | None = 4096
    use_sliding_window: bool = False
    max_window_layers: int = 28
    attention_bias: bool = False


class Qwen3Json(QwenJson):
    """Qwen3's, whose reference has other defaults."""

    num_key_value_heads: Heads = 32
    head_dim: HeadDim = 128


class Qwen3MoeJson(QwenJson):
    """That of Qwen3's with experts."""

    num_key_value_heads: Heads = 4
    num_experts: NumExperts = Field(
        128, validation_alias=AliasChoices("num_experts", "num_local_experts")
    )
    num_experts_per_tok: NumExperts = 8
    moe_intermediate_size: Inner = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: NumExperts = 1
    mlp_only_layers: list[int] | None = None


def _config(raw: QwenJson, generation: Fields) -> DecoderConfig:
    if not raw.use_sliding_window:
        raw = raw.model_copy(update={"sliding_window": None, "layer_types": None})
    windows = layers_of(
        raw, lambda layer: raw.sliding_window is not None and layer >= raw.max_window_layers
    )
    return decoder_config(raw, generation, windows, *rope_of(raw))


def read_qwen2(fields: Fields, generation: Fields) -> DecoderConfig:
    """The configuration that a config.json says. Raises ModelError, ValidationError."""
    return replace(_config(QwenJson.model_validate(fields), generation), qkv_bias=True)


def read_qwen3(fields: Fields, generation: Fields) -> DecoderConfig:
    """The same of Qwen3. Raises ModelError, ValidationError."""
    raw = Qwen3Json.model_validate(fields)
    bias = raw.attention_bias
    return replace(_config(raw, generation), qk_norm="head", qkv_bias=bias, output_bias=bias)


def read_qwen3_moe(fields: Fields, generation: Fields) -> DecoderConfig:
    """The same of Qwen3 with experts. Raises ModelError, ValidationError."""
    raw = Qwen3MoeJson.model_validate(fields)
    if not raw.use_sliding_window:
        raw = raw.model_copy(update={"sliding_window": None})
    config = decoder_config(raw, generation, all_or_none(raw), *rope_of(raw))
    dense = raw.mlp_only_layers or []
    experts = Experts(
        raw.num_experts,
        raw.num_experts_per_tok,
        raw.moe_intermediate_size,
        are_normalised=raw.norm_topk_prob,
        layers=frozenset(
            layer
            for layer in range(raw.num_hidden_layers)
            if layer not in dense and (layer + 1) % raw.decoder_sparse_step == 0
        ),
    )
    bias = raw.attention_bias
    return replace(
        config, qk_norm="head", qkv_bias=bias, output_bias=bias, experts=experts.checked()
    )


QWEN2 = Family(read=read_qwen2, build=DecoderShard, names=NAMES, stream=STREAM)
QWEN3 = Family(read=read_qwen3, build=DecoderShard, names=NAMES, stream=STREAM)
QWEN3_MOE = Family(read=read_qwen3_moe, build=DecoderShard, names=NAMES, is_routed=True)
