"""What a model's files say beside its configuration: names, a head of its own, weights' bits."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pipeline.dtypes import Precision
from pipeline.errors import ModelError
from pipeline.kernels.base import Kernels, Linear, LinearSpec
from pipeline.kernels.shape_only_kernels import Outline
from pipeline.models.families import FAMILIES
from pipeline.models.family import Family
from pipeline.models.layer_parts import LayerParts
from pipeline.models.model_config import ModelConfig
from pipeline.models.older_client_part import is_older_layout, names_in_file
from pipeline.models.shard_model import Shard, ShardSpec
from pipeline.weights.checkpoint import has_weights, names_beyond_int4, stored_names
from pipeline.weights.tensor_sinks import WeightSink


def _has_own_head(model_dir: Path, config: ModelConfig) -> bool:
    """Whether the weights hold a head, though the configuration says that it is the embedding.

    Merged and fine-tuned models do: what was trained is what is stored. Raises ModelError.
    """
    name = f"{family_of(config).names.head}.weight"
    return config.tie_word_embeddings and name in stored_names(model_dir, config.packing)


def as_stored(
    model_dir: Path, config: ModelConfig, precision: Precision = "float32"
) -> ModelConfig:
    """A configuration as its weights mean it: what they have of their own, and how they are held.

    Of the weights' files the headers are read; where there are none it stays as it is. Raises
    ModelError.
    """
    if not has_weights(model_dir):
        return config
    if _has_own_head(model_dir, config):
        config = replace(config, tie_word_embeddings=False)
    if precision == "int4":
        config = replace(config, int8_linears=_int8_linears(model_dir, config))
    return config


class _NamingParts(LayerParts):
    """Notes what each linear is called."""

    def __init__(self) -> None:
        self.name_of: dict[int, str] = {}

    def linear(self, name: str, spec: LinearSpec, kernels: Kernels) -> Linear:
        """The kernels' own."""
        made = kernels.linear(spec)
        self.name_of[id(made)] = name
        return made


def _int8_linears(model_dir: Path, config: ModelConfig) -> tuple[str, ...]:
    """Those of which a part comes in more bits than int4 has."""
    beyond = names_beyond_int4(model_dir, config.packing)
    if not beyond:
        return ()
    parts = _NamingParts()
    shard = build(config, ShardSpec(range(config.num_layers), Outline(), "int4", parts))
    sinks = shard.destinations()
    stored = names_in_files(model_dir, config, sinks)
    found = {
        parts.name_of.get(id(sink.store), "")
        for name, sink in sinks.items()
        if stored[name] in beyond and isinstance(sink, WeightSink)
    }
    return tuple(sorted(found - {""}))


def build(config: ModelConfig, spec: ShardSpec) -> Shard:
    """A shard whose weights are yet to come. Raises ModelError for what its family cannot be."""
    family = family_of(config)
    if spec.ends is not None and family.layers_take_ids:
        raise ModelError(
            f"{config.architecture}: its layers take the token ids once more (per-layer inputs), "
            "which stages are not to see where the split is client: use split stages"
        )
    if family.is_routed and spec.parts.are_watched:
        raise ModelError(
            f"{config.architecture}: a row meets the experts that are chosen for it, and which "
            "these are would tell whoever multiplies by them of its token: serve it without a "
            "linear worker"
        )
    return family.build(config, spec)


def family_of(config: ModelConfig) -> Family:
    """What serves a model. Raises ModelError."""
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise ModelError(f"architecture {config.architecture!r} is not supported")
    return family


def names_in_files(model_dir: Path, config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Our name -> the name in the files, which may carry the architecture's prefix."""
    stored = stored_names(model_dir, config.packing)
    found = {name: name for name in names}
    family = family_of(config)
    if family.prefix and any(name.startswith(family.prefix) for name in stored):
        head = f"{family.names.head}."
        found = {n: n if n.startswith(head) else family.prefix + n for n in found}
    if is_older_layout(stored):
        found = names_in_file(family.names, found, stored)
    return found
