"""Mistral, Ministral and Mixtral: Llamas whose layers may have a window, and experts."""

from dataclasses import replace

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
from pipeline.models.model_config import Epsilon, Fields, Inner, NumExperts


def read(fields: Fields, generation: Fields) -> DecoderConfig:
    """The configuration that a config.json says. Raises ModelError, ValidationError."""
    raw = DecoderJson.model_validate(fields)
    return decoder_config(raw, generation, all_or_none(raw), *rope_of(raw))


def read_ministral(fields: Fields, generation: Fields) -> DecoderConfig:
    """The same of models whose layers differ. Raises ModelError, ValidationError."""
    raw = DecoderJson.model_validate(fields)
    windows = layers_of(raw, lambda _: raw.sliding_window is not None)
    return decoder_config(raw, generation, windows, *rope_of(raw))


class MixtralJson(DecoderJson):
    """A Mixtral's config.json."""

    rms_norm_eps: Epsilon = 1e-5
    num_local_experts: NumExperts
    num_experts_per_tok: NumExperts = 2
    intermediate_size: Inner


def read_mixtral(fields: Fields, generation: Fields) -> DecoderConfig:
    """The same of models with experts. Raises ModelError, ValidationError."""
    raw = MixtralJson.model_validate(fields)
    config = decoder_config(raw, generation, all_or_none(raw), *rope_of(raw))
    experts = Experts(
        raw.num_local_experts,
        raw.num_experts_per_tok,
        raw.intermediate_size,
        are_normalised=True,
        layers=frozenset(range(raw.num_hidden_layers)),
        block="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    )
    return replace(config, experts=experts.checked())


MISTRAL = Family(read=read, build=DecoderShard, names=NAMES, stream=STREAM)
MINISTRAL = Family(read=read_ministral, build=DecoderShard, names=NAMES, stream=STREAM)
MIXTRAL = Family(read=read_mixtral, build=DecoderShard, names=NAMES, is_routed=True)
