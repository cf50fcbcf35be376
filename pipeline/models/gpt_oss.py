"""gpt-oss: sinks in attention, a window in every other layer, clamped gates, experts in MXFP4."""

import math
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from pipeline.kernels.gates import Gate
from pipeline.models.decoder import NAMES, DecoderShard
from pipeline.models.decoder_config import (
    DecoderConfig,
    DecoderJson,
    Experts,
    decoder_config,
    layers_of,
    rope_of,
)
from pipeline.models.family import Family
from pipeline.models.model_config import Epsilon, Fields, HeadDim, Heads, NumExperts
from pipeline.models.rope_config import Positions, Scale

# What its reference turns heads by where a file does not say.
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
THETA = 150000.0


class GptOssJson(DecoderJson):
    """Its config.json."""

    num_attention_heads: Heads = 64
    num_key_value_heads: Heads = 8
    head_dim: HeadDim = 64
    max_position_embeddings: Positions = 131072
    rms_norm_eps: Epsilon = 1e-5
    sliding_window: Positions = 128
    attention_bias: bool = True
    num_local_experts: NumExperts = 128
    num_experts_per_tok: NumExperts = 4
    # not in GGUF files, and so in none that are made of these
    experts_are_stacked: bool = True
    swiglu_alpha: Scale = 1.702
    swiglu_limit: Annotated[float, Field(gt=0, le=math.inf)] = 7.0


def read(fields: Fields, generation: Fields) -> DecoderConfig:
    """The configuration that a config.json says. Raises ModelError, ValidationError."""
    raw = GptOssJson.model_validate(fields)
    given = [each for each in (raw.rope_parameters, raw.rope_scaling) if each]
    rope = rope_of(raw, *(given or [ROPE]), theta=raw.rope_theta or THETA)
    windows = layers_of(raw, lambda layer: layer % 2 == 0)
    experts = Experts(
        raw.num_local_experts,
        raw.num_experts_per_tok,
        raw.intermediate_size,
        are_normalised=True,
        layers=frozenset(range(raw.num_hidden_layers)),
        has_bias=True,
        are_stacked=raw.experts_are_stacked,
        router="router",
    )
    return replace(
        decoder_config(raw, generation, windows, *rope),
        qkv_bias=raw.attention_bias,
        output_bias=raw.attention_bias,
        has_sinks=True,
        gate=Gate("clamped", raw.swiglu_alpha, raw.swiglu_limit),
        experts=experts.checked(),
    )


FAMILY = Family(read=read, build=DecoderShard, names=NAMES, is_routed=True)
