"""What a GGUF file calls things, in the words of the checkpoints that families are written for.

Source: llama.cpp's `convert_hf_to_gguf.py`, undone.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from pipeline.dtypes import Floats
from pipeline.gguf.header import CorruptGguf, GgufHead, GgufTensor, Metadata, shown

Fields = dict[str, Any]
Number = TypeVar("Number", int, float)

ARCHITECTURE_KEY = "general.architecture"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# What the frequencies of llama3's scaling are divided by; it is no weight.
ROPE_FACTORS = "rope_freqs.weight"
_LAYER = re.compile(r"blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)")
_TURNED = re.compile(r"\.self_attn\.[qk]_proj\.")
_ENDS = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_PARTS = _LAYER_PARTS | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# The scaling of all models that have it: Llama 3.1 and what was made of it.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What would change the result and is not computed, where it is not 0.
_NOT_COMPUTED = (
    "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attn_logit_softcapping",
    "final_logit_softcapping", "embedding_scale", "residual_scale", "logit_scale",
)  # fmt: skip
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True, slots=True)
class Meaning:
    """A tensor's name in checkpoints, and what was done to it there is to undo.

    `pair_rows`: the rows of a head, which lie as rotary pairs and not half a head apart; 0 where
    they lie as in checkpoints. `added`: to each of its values.
    """

    name: str
    pair_rows: int = 0
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family by GGUF's name: what it is in checkpoints, and what more its config.json says."""

    model_type: str
    parts: Mapping[str, str]
    more: Callable[[GgufHead, Fields], Fields]
    has_pairs: bool = False
    norms_added: float = 0.0


def meanings(head: GgufHead) -> dict[str, Meaning]:
    """Each weight of the file -> what it is. Raises CorruptGguf for one that has no meaning."""
    kind = _architecture(head.metadata)
    pair_rows = _sizes(head)["head_dim"] if kind.has_pairs else 0
    found = {}
    for tensor in head.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        name = _checkpoint_name(tensor.name, kind)
        rows = pair_rows if _TURNED.search(name) else 0
        if rows and (rows % 2 or not tensor.shape or tensor.shape[0] % rows):
            raise CorruptGguf(
                f"tensor {shown(tensor.name)} has the shape {list(tensor.shape)}, which is no "
                f"heads of {rows} rows"
            )
        added = kind.norms_added if name.endswith("norm.weight") else 0.0
        found[tensor.name] = Meaning(name, rows, added)
    return found


def config_fields(head: GgufHead, rope_factors: Floats | None) -> Fields:
    """The config.json that a checkpoint of this model has. Raises CorruptGguf."""
    kind, metadata = _architecture(head.metadata), head.metadata
    names = {tensor.name for tensor in head.tensors}
    ends = [metadata.size(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    fields = {
        "model_type": kind.model_type,
        **_sizes(head),
        "tie_word_embeddings": HEAD not in names,
        "bos_token_id": metadata.size("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}),
        "rope_scaling": _rope_scaling(head, rope_factors),
    }
    return fields | kind.more(head, fields)


def embedding(head: GgufHead) -> GgufTensor:
    """The embedding's entry. Raises CorruptGguf."""
    for tensor in head.tensors:
        if tensor.name == EMBEDDING and len(tensor.shape) == 2:
            return tensor
    raise CorruptGguf(f"it has no matrix {EMBEDDING}, so it is no language model")


def _architecture(metadata: Metadata) -> Architecture:
    name = metadata.text(ARCHITECTURE_KEY)
    if name is None:
        raise CorruptGguf(f"its {ARCHITECTURE_KEY} is missing")
    if name not in ARCHITECTURES:
        *others, last = ARCHITECTURES
        raise CorruptGguf(
            f"its architecture {name[:40]!r} is not supported: use a {', '.join(others)} or "
            f"{last} model"
        )
    if (num_parts := metadata.size("split.count") or 1) > 1:
        raise CorruptGguf(f"it is one of {num_parts} parts: merge them with llama-gguf-split")
    if metadata.size(f"{name}.expert_count"):
        raise CorruptGguf(f"it is a mixture of experts, which {name} models are not read as")
    for key in _NOT_COMPUTED:
        if value := metadata.number(f"{name}.{key}"):
            raise CorruptGguf(f"its {name}.{key} is {value}, which is not computed")
    return ARCHITECTURES[name]


def _checkpoint_name(name: str, kind: Architecture) -> str:
    if name in _ENDS:
        return _ENDS[name]
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[2] not in kind.parts:
        raise CorruptGguf(f"it has a tensor {shown(name)}, which no {kind.model_type} model has")
    return f"model.layers.{int(layer[1])}.{kind.parts[layer[2]]}.{layer[3]}"


def _needed(metadata: Metadata, key: str, read: Callable[[str], Number | None]) -> Number:
    """What `read` has of a key of the architecture's."""
    name = metadata.text(ARCHITECTURE_KEY)
    value = read(f"{name}.{key}")
    if value is None:
        raise CorruptGguf(f"its {name}.{key} is missing")
    return value


def _decimal(value: float) -> float:
    """What was stored in float32, by its shortest decimal."""
    return float(str(np.float32(value)))


def _sizes(head: GgufHead) -> Fields:
    """What all of these families call the same."""
    metadata, name = head.metadata, head.metadata.text(ARCHITECTURE_KEY)

    def size(key: str) -> int:
        return _needed(metadata, key, metadata.size)

    def optional(key: str) -> int | None:
        return metadata.size(f"{name}.{key}")

    heads, hidden = size("attention.head_count"), size("embedding_length")
    head_dim = optional("attention.key_length") or hidden // max(1, heads)
    if (optional("attention.value_length") or head_dim) != head_dim:
        raise CorruptGguf("its values are not as long as its keys, which is not supported")
    if head_dim < 1 or (optional("rope.dimension_count") or head_dim) != head_dim:
        raise CorruptGguf("its rotary positions turn part of a head, which is not supported")
    theta = metadata.number(f"{name}.rope.freq_base")
    eps = _needed(metadata, "attention.layer_norm_rms_epsilon", metadata.number)
    return {
        "vocab_size": embedding(head).shape[0],
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": _decimal(eps),
        "rope_theta": 10000.0 if theta is None else _decimal(theta),
    }


def _rope_scaling(head: GgufHead, factors: Floats | None) -> Fields | None:
    metadata, name = head.metadata, head.metadata.text(ARCHITECTURE_KEY)
    if factors is not None:
        return _llama3_scaling(head, factors)
    kind = metadata.text(f"{name}.rope.scaling.type")
    if kind in {None, "none"}:
        return None
    original = metadata.size(f"{name}.rope.scaling.original_context_length")
    return {
        "rope_type": kind,
        "factor": _decimal(_needed(metadata, "rope.scaling.factor", metadata.number)),
    } | ({} if original is None else {"original_max_position_embeddings": original})


def _llama3_scaling(head: GgufHead, factors: Floats) -> Fields:
    """The parameters that give these factors."""
    sizes = _sizes(head)
    factor = _decimal(factors.max(initial=0))
    if len(factors) * 2 == sizes["head_dim"]:
        exponents = np.arange(len(factors)) / len(factors)
        with np.errstate(all="ignore"):
            wavelengths = 2 * np.pi * np.power(sizes["rope_theta"], exponents)
            turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
            low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
            ramp = np.clip((turns - low) / (high - low), 0, 1)
            expected = 1 / ((1 - ramp) / factor + ramp)
        if np.allclose(factors, expected, rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise CorruptGguf(f"its {ROPE_FACTORS} is not Llama 3's, which alone is supported")


def _has(head: GgufHead, name: str) -> bool:
    return any(tensor.name == name for tensor in head.tensors)


def _llama(head: GgufHead, fields: Fields) -> Fields:
    del fields
    return {
        "attention_bias": _has(head, "blk.0.attn_q.bias"),
        "mlp_bias": _has(head, "blk.0.ffn_gate.bias"),
    }


def _qwen(head: GgufHead, fields: Fields) -> Fields:
    del head, fields
    return {"use_sliding_window": False}


def _gemma3(head: GgufHead, fields: Fields) -> Fields:
    # The attention's scale is in no metadata: llama.cpp, too, tells the one exception by its depth.
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    depth = fields["num_hidden_layers"]
    metadata = head.metadata
    theta = metadata.number("gemma3.rope.freq_base_swa")
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": hidden // heads if depth == 62 else fields["head_dim"],
        "sliding_window": _needed(metadata, "attention.sliding_window", metadata.size),
        "sliding_window_pattern": metadata.size("gemma3.attention.sliding_window_pattern") or 6,
        "rope_local_base_freq": 10000.0 if theta is None else _decimal(theta),
    }


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("llama", _LAYER_PARTS, _llama, has_pairs=True),
        "qwen2": Architecture("qwen2", _LAYER_PARTS, _qwen),
        "qwen3": Architecture("qwen3", _LAYER_PARTS, _qwen),
        "gemma3": Architecture("gemma3_text", _GEMMA_PARTS, _gemma3, norms_added=1.0),
    }
)
