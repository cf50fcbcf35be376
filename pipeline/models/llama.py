"""Llama 1 to 3.3, SmolLM2, TinyLlama and whatever else calls itself so."""

from dataclasses import replace

from pipeline.models.decoder import NAMES, STREAM, DecoderShard
from pipeline.models.decoder_config import (
    DecoderConfig,
    DecoderJson,
    all_or_none,
    decoder_config,
    rope_of,
)
from pipeline.models.family import Family
from pipeline.models.model_config import Fields


class LlamaJson(DecoderJson):
    """Its config.json."""

    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: None = None


def read(fields: Fields, generation: Fields) -> DecoderConfig:
    """The configuration that a config.json says. Raises ModelError, ValidationError."""
    raw = LlamaJson.model_validate(fields)
    config = decoder_config(raw, generation, all_or_none(raw), *rope_of(raw))
    return replace(
        config,
        qkv_bias=raw.attention_bias,
        output_bias=raw.attention_bias,
        mlp_bias=raw.mlp_bias,
    )


FAMILY = Family(read=read, build=DecoderShard, names=NAMES, stream=STREAM)
