"""OLMo 2 and 3: what attention and MLPs make of rows is normed, and not what they take."""

from dataclasses import replace

from pipeline.models.decoder import NAMES, DecoderShard
from pipeline.models.decoder_config import (
    DecoderConfig,
    DecoderJson,
    NormNames,
    all_or_none,
    decoder_config,
    layers_of,
    rope_of,
    ropes_by_type,
)
from pipeline.models.family import Family
from pipeline.models.model_config import Epsilon, Fields

THETA = 500000.0  # of OLMo 3, where a file says none
NORMS = NormNames(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)


class OlmoJson(DecoderJson):
    """The config.json of either."""

    rms_norm_eps: Epsilon = 1e-5
    attention_bias: bool = False
    clip_qkv: None = None


def _as_olmo(config: DecoderConfig, raw: OlmoJson) -> DecoderConfig:
    bias = raw.attention_bias
    return replace(config, norms=NORMS, qk_norm="width", qkv_bias=bias, output_bias=bias)


def read_olmo2(fields: Fields, generation: Fields) -> DecoderConfig:
    """The configuration that a config.json says. Raises ModelError, ValidationError."""
    raw = OlmoJson.model_validate(fields).model_copy(update={"sliding_window": None})
    return _as_olmo(decoder_config(raw, generation, all_or_none(raw), *rope_of(raw)), raw)


def read_olmo3(fields: Fields, generation: Fields) -> DecoderConfig:
    """The same of layers of two types, of which one alone is stretched. Raises as the other."""
    raw = OlmoJson.model_validate({"sliding_window": 4096} | fields)
    ropes = ropes_by_type(raw, theta=THETA, window_theta=THETA)
    windows = layers_of(raw, lambda layer: (layer + 1) % 4 != 0)
    return _as_olmo(decoder_config(raw, generation, windows, *ropes), raw)


OLMO2 = Family(read=read_olmo2, build=DecoderShard, names=NAMES)
OLMO3 = Family(read=read_olmo3, build=DecoderShard, names=NAMES)
