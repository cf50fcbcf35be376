"""Gemma 3: norms on both sides of a branch, windows in five layers of six, scaled embeddings."""

import math
from dataclasses import replace
from typing import Literal

from pipeline.kernels.gains import Gain
from pipeline.kernels.gates import GELU
from pipeline.models.decoder import NAMES, DecoderShard
from pipeline.models.decoder_config import (
    DecoderConfig,
    DecoderJson,
    NormNames,
    decoder_config,
    layers_of,
    ropes_by_type,
)
from pipeline.models.family import Family
from pipeline.models.model_config import Fields, HeadDim, Heads
from pipeline.models.rope_config import Positions, Scale

NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
THETA, LOCAL_THETA = 1e6, 1e4  # of layers that look back to the start, and of the others


class GemmaJson(DecoderJson):
    """Its config.json."""

    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads = 4
    head_dim: HeadDim = 256
    max_position_embeddings: Positions = 131072
    rope_local_base_freq: Scale | None = None
    sliding_window: Positions = 4096
    sliding_window_pattern: Positions = 6
    query_pre_attn_scalar: Scale = 256
    attention_bias: Literal[False] = False
    attn_logit_softcapping: None = None
    final_logit_softcapping: None = None
    use_bidirectional_attention: Literal[False] | None = False
    tie_word_embeddings: bool = True


def read(fields: Fields, generation: Fields) -> DecoderConfig:
    """The configuration that a config.json says. Raises ModelError, ValidationError."""
    # older files have gelu there, and mean what the newer field says
    raw = GemmaJson.model_validate({name: fields[name] for name in fields if name != "hidden_act"})
    local_theta = raw.rope_local_base_freq or LOCAL_THETA
    ropes, _ = ropes_by_type(raw, theta=THETA, window_theta=local_theta)
    windows = layers_of(raw, lambda layer: (layer + 1) % raw.sliding_window_pattern != 0)
    # the length that the file says is that after scaling
    config = decoder_config(raw, generation, windows, ropes, raw.max_position_embeddings)
    return replace(
        config,
        norms=NORMS,
        gain=Gain(shift=1.0),
        qk_norm="head",
        query_scale=math.sqrt(raw.head_dim / raw.query_pre_attn_scalar),
        gate=GELU,
        embedding_scale=math.sqrt(raw.hidden_size),
    )


FAMILY = Family(read=read, build=DecoderShard, names=NAMES)
