"""The families of models there are, by config.json's model_type; and what others would need."""

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.models.family import Family

if TYPE_CHECKING:  # an image carries what is named by a statement, wherever that stands
    from pipeline.models import gemma, gpt2, gpt_oss, llama, mistral, olmo, phi, qwen  # noqa: F401


class _Families(MutableMapping[str, Family]):
    """Each is imported when it is asked for: a stage has one, and needs no other's fields."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """`places`: the module of each here, and its name there."""
        self._found: dict[str, Family | str] = {**places}

    def __getitem__(self, name: str) -> Family:
        found = self._found[name]
        if isinstance(found, str):
            module, own = found.split(".")
            found = self._found[name] = getattr(import_module(f"pipeline.models.{module}"), own)
        return found

    def __setitem__(self, name: str, family: Family) -> None:
        self._found[name] = family

    def __delitem__(self, name: str) -> None:
        del self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


FAMILIES = _Families(
    {
        "gpt2": "gpt2.FAMILY",
        "llama": "llama.FAMILY",
        "mistral": "mistral.MISTRAL",
        "ministral": "mistral.MINISTRAL",
        "mixtral": "mistral.MIXTRAL",
        "qwen2": "qwen.QWEN2",
        "qwen3": "qwen.QWEN3",
        "qwen3_moe": "qwen.QWEN3_MOE",
        "olmo2": "olmo.OLMO2",
        "olmo3": "olmo.OLMO3",
        "phi3": "phi.FAMILY",
        "gemma3_text": "gemma.FAMILY",
        "gpt_oss": "gpt_oss.FAMILY",
    }
)

_CAPS = "soft caps on attention and logits"
_VISION = "only text is served: use a model without a vision tower"
_LATENT = "latent attention is not computed"
_STATES = "layers whose state is not keys and values are not computed"
# What is missing for families that people ask for.
MISSING: Mapping[str, str] = {
    "gemma": "its embeddings and norms are, its configuration is not read: use Gemma 3",
    "gemma2": f"{_CAPS} are not computed: use Gemma 3",
    "gemma3": _VISION + " (gemma3_text)",
    "gemma3n": "per-layer inputs and shared keys and values are not computed",
    "gemma4": "per-layer inputs and shared keys and values are not computed",
    "mistral3": _VISION,
    "ministral3": "queries that grow with their position are not computed",
    "llama4": "attention in chunks and layers without positions are not computed",
    "qwen2_moe": "shared experts are not computed: use Qwen3-MoE",
    "qwen2_vl": _VISION,
    "qwen2_5_vl": _VISION,
    "qwen3_vl": _VISION,
    "qwen3_next": _STATES,
    "qwen3_5": _STATES,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4": "rotary positions in adjacent pairs are not computed",
    "glm4_moe": "shared experts are not computed",
    "phimoe": "its sparse mixer is not computed: use Phi 3 or 4",
    "mamba": _STATES,
    "mamba2": _STATES,
    "falcon_mamba": _STATES,
    "jamba": _STATES,
    "rwkv": _STATES,
    "smollm3": "layers without rotary positions are not computed",
    "cohere": "parallel layers and scaled logits are not computed",
    "cohere2": "parallel layers and scaled logits are not computed",
    "granite": "scaled branches and logits are not computed",
}


def why_missing(model_type: object) -> str:
    """What a model of no family here would need, and which are served."""
    *others, last = FAMILIES
    served = f"use a {', '.join(others)} or {last} model"
    needs = MISSING.get(model_type) if isinstance(model_type, str) else None
    return served if needs is None else f"{needs} ({served})"
