"""Phi 3 and 4: Llamas whose queries, keys and values are one tensor, and heads turn in part."""

from dataclasses import replace
from typing import Any

from pipeline.models.decoder import NAMES, STREAM, DecoderShard
from pipeline.models.decoder_config import (
    DecoderConfig,
    DecoderJson,
    all_or_none,
    decoder_config,
    rope_of,
)
from pipeline.models.family import Family
from pipeline.models.model_config import Epsilon, Fields
from pipeline.models.rope_config import Positions

LONG = "longrope"
OLDER_NAMES = ("su", "yarn")  # of it, in this family's files


class PhiJson(DecoderJson):
    """Its config.json."""

    rms_norm_eps: Epsilon = 1e-5
    original_max_position_embeddings: Positions = 4096


def read(fields: Fields, generation: Fields) -> DecoderConfig:
    """The configuration that a config.json says. Raises ModelError, ValidationError."""
    raw = PhiJson.model_validate(fields)
    rope, max_positions = rope_of(
        raw, _renamed(raw.rope_parameters), _renamed(raw.rope_scaling), may_be_partial=True
    )
    config = decoder_config(raw, generation, all_or_none(raw), rope, max_positions)
    return replace(config, is_fused=True)


def _renamed(spelling: dict[str, Any] | None) -> dict[str, Any] | None:
    if not spelling:
        return None
    kinds = {name: LONG for name in ("type", "rope_type") if spelling.get(name) in OLDER_NAMES}
    return spelling | kinds


FAMILY = Family(
    read=read,
    build=DecoderShard,
    names=NAMES,
    stream=replace(
        STREAM,
        readers={
            "input_layernorm": ("self_attn.qkv_proj",),
            "post_attention_layernorm": ("mlp.gate_up_proj",),
        },
    ),
)
