"""A GGUF file's metadata as the config.json that the same model has as a checkpoint.

Source: llama.cpp's `convert_hf_to_gguf.py`, undone; what is in no metadata, as its models have it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from pipeline.dtypes import Floats
from pipeline.gguf.header import ARCHITECTURE_KEY, CorruptGguf, GgufHead, GgufTensor, Metadata

Fields = dict[str, Any]
Number = TypeVar("Number", int, float)

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# What rotary frequencies are divided by; they are no weights.
LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_FACTORS = (LLAMA3, LONG, SHORT)
Factors = Mapping[str, Floats]

# The scaling of all models that have it: Llama 3.1 and what was made of it.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# config.json's names of what there may be to YaRN.
_YARN = {
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
MAX_LAYERS = 10_000  # more than names of tensors have digits for; lists are made for each
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def embedding(head: GgufHead) -> GgufTensor:
    """The embedding's entry. Raises CorruptGguf."""
    for tensor in head.tensors:
        if tensor.name == EMBEDDING and len(tensor.shape) == 2:
            return tensor
    raise CorruptGguf(f"it has no matrix {EMBEDDING}, so it is no language model")


def head_dim(head: GgufHead) -> int:
    """Dimensions of a head. Raises CorruptGguf."""
    width, heads = _size(head, "embedding_length"), _size(head, "attention.head_count")
    found = _optional(head, "attention.key_length") or width // max(1, heads)
    if (_optional(head, "attention.value_length") or found) != found:
        raise CorruptGguf("its values are not as long as its keys, which is not supported")
    if found < 1:
        raise CorruptGguf(f"its heads have {found} dimensions")
    return found


def _num_layers(head: GgufHead) -> int:
    found = _size(head, "block_count")
    if found > MAX_LAYERS:
        raise CorruptGguf(f"its {_name(head.metadata)}.block_count is {found}")
    return found


def num_experts(head: GgufHead) -> int:
    """How many a layer has. Raises CorruptGguf."""
    return max(1, _size(head, "expert_count"))


def llama(head: GgufHead, factors: Factors) -> Fields:
    """Also Mistral's, SmolLM's and others'. Raises CorruptGguf, as all of these do."""
    return _decoder(head, factors, "llama") | {
        "attention_bias": _has(head, "blk.0.attn_q.bias"),
        "mlp_bias": _has(head, "blk.0.ffn_gate.bias"),
    }


def mixtral(head: GgufHead, factors: Factors) -> Fields:
    """A Llama with experts."""
    return _decoder(head, factors, "mixtral") | {
        "num_local_experts": num_experts(head),
        "num_experts_per_tok": _size(head, "expert_used_count"),
    }


def qwen2(head: GgufHead, factors: Factors) -> Fields:
    """Qwen 2 and 2.5."""
    return _decoder(head, factors, "qwen2") | {"use_sliding_window": False}


def qwen3(head: GgufHead, factors: Factors) -> Fields:
    """Without experts."""
    fields = _decoder(head, factors, "qwen3") | {"use_sliding_window": False}
    return fields | ({"attention_bias": True} if _has(head, "blk.0.attn_q.bias") else {})


def qwen3_moe(head: GgufHead, factors: Factors) -> Fields:
    """With experts, whose shares always add up to one there."""
    fields, chosen = qwen3(head, factors), _size(head, "expert_used_count")
    inner = _optional(head, "expert_feed_forward_length")
    return fields | {
        "model_type": "qwen3_moe",
        "num_experts": num_experts(head),
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": inner or fields["intermediate_size"] // max(1, chosen),
        "norm_topk_prob": True,
    }


def gemma3(head: GgufHead, factors: Factors) -> Fields:
    """Its text."""
    # The attention's scale is in no metadata: llama.cpp, too, tells the one exception by its depth.
    fields = _decoder(head, factors, "gemma3_text")
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    theta = head.metadata.number("gemma3.rope.freq_base_swa")
    pattern = _optional(head, "attention.sliding_window_pattern")
    return fields | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": (
            hidden // heads if fields["num_hidden_layers"] == 62 else fields["head_dim"]
        ),
        "sliding_window": _size(head, "attention.sliding_window"),
        "sliding_window_pattern": pattern or 6,
        "rope_local_base_freq": 10000.0 if theta is None else _decimal(theta),
    }


def olmo(head: GgufHead, factors: Factors) -> Fields:
    """OLMo 2, or 3, which has a window in some layers."""
    fields = _decoder(head, factors, "olmo2")
    fields["attention_bias"] = _has(head, "blk.0.attn_q.bias")
    window = _optional(head, "attention.sliding_window")
    if not window:
        return fields
    theta = head.metadata.number("olmo2.rope.freq_base_swa")
    own = {"rope_theta": fields["rope_theta"] if theta is None else _decimal(theta)}
    full = {"rope_theta": fields["rope_theta"]} | (fields["rope_scaling"] or {})
    return fields | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": _layer_types(head, fields["num_hidden_layers"], every=4),
        "rope_scaling": None,
        "rope_parameters": {"full_attention": full, "sliding_attention": own},
    }


def phi3(head: GgufHead, factors: Factors) -> Fields:
    """Phi 3 and 4, whose heads may turn in part, by factors of each pair."""
    fields, width = _decoder(head, factors, "phi3", may_be_partial=True), head_dim(head)
    turned = _optional(head, "rope.dimension_count") or width
    part = turned / width
    return fields | {
        # so that its product with the width is whole once more
        "partial_rotary_factor": part if int(width * part) == turned else math.nextafter(part, 2),
        "sliding_window": _optional(head, "attention.sliding_window") or None,
        "original_max_position_embeddings": (
            _optional(head, "rope.scaling.original_context_length")
            or fields["max_position_embeddings"]
        ),
    }


def gpt_oss(head: GgufHead, factors: Factors) -> Fields:
    """With each expert's tensors by themselves, as they lie there."""
    inner = _optional(head, "expert_feed_forward_length")
    fields = _decoder(head, factors, "gpt_oss", inner=inner)
    rope = fields["rope_scaling"]
    return fields | {
        "attention_bias": _has(head, "blk.0.attn_q.bias"),
        "num_local_experts": num_experts(head),
        "num_experts_per_tok": _size(head, "expert_used_count"),
        "experts_are_stacked": False,
        "sliding_window": _size(head, "attention.sliding_window"),
        "layer_types": _layer_types(head, fields["num_hidden_layers"], every=2),
        "rope_scaling": {"rope_type": "default"} if rope is None else rope | {"truncate": False},
    }


def gpt2(head: GgufHead, factors: Factors) -> Fields:
    """Learned positions, and the one activation that there is for it there."""
    del factors
    eps = _needed(head, "attention.layer_norm_epsilon", head.metadata.number)
    return {
        "model_type": "gpt2",
        "vocab_size": embedding(head).shape[0],
        **_ends(head),
        "n_embd": _size(head, "embedding_length"),
        "n_layer": _num_layers(head),
        "n_head": _size(head, "attention.head_count"),
        "n_positions": _size(head, "context_length"),
        "n_inner": _size(head, "feed_forward_length"),
        "layer_norm_epsilon": _decimal(eps),
        "activation_function": "gelu_new",
    }


def _ends(head: GgufHead) -> Fields:
    """What all models say of embedding, head and the tokens that begin and end texts."""
    metadata = head.metadata
    ends = [metadata.size(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    return {
        "tie_word_embeddings": not _has(head, HEAD),
        "bos_token_id": metadata.size("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}),
    }


def _decoder(
    head: GgufHead,
    factors: Factors,
    model_type: str,
    *,
    inner: int | None = None,
    may_be_partial: bool = False,
) -> Fields:
    """What families with rotary positions call the same, in an order that manifests have pinned."""
    metadata, heads = head.metadata, _size(head, "attention.head_count")
    width = head_dim(head)
    turned = _optional(head, "rope.dimension_count") or width
    if turned > width or (turned != width and not may_be_partial):
        raise CorruptGguf("its rotary positions turn part of a head, which is not supported")
    theta = metadata.number(f"{_name(metadata)}.rope.freq_base")
    eps = _needed(head, "attention.layer_norm_rms_epsilon", metadata.number)
    return {
        "model_type": model_type,
        "vocab_size": embedding(head).shape[0],
        "hidden_size": _size(head, "embedding_length"),
        "intermediate_size": inner or _size(head, "feed_forward_length"),
        "num_hidden_layers": _num_layers(head),
        "num_attention_heads": heads,
        "num_key_value_heads": _optional(head, "attention.head_count_kv") or heads,
        "head_dim": width,
        "max_position_embeddings": _size(head, "context_length"),
        "rms_norm_eps": _decimal(eps),
        "rope_theta": 10000.0 if theta is None else _decimal(theta),
        **_ends(head),
        "rope_scaling": _rope_scaling(head, factors, turned, theta or 10000.0),
    }


def _layer_types(head: GgufHead, num_layers: int, every: int) -> list[str]:
    """All layers but each of so many, the last of them, have a window; or those that it lists."""
    key = f"{_name(head.metadata)}.attention.sliding_window_pattern"
    if head.metadata.is_array(key):
        windows = list(map(bool, head.metadata.numbers(key) or ()))
    else:
        every = head.metadata.size(key) or every
        windows = [(layer + 1) % every != 0 for layer in range(num_layers)]
    return ["sliding_attention" if each else "full_attention" for each in windows]


def _rope_scaling(head: GgufHead, factors: Factors, turned: int, theta: float) -> Fields | None:
    metadata, prefix = head.metadata, f"{_name(head.metadata)}.rope.scaling."
    if LLAMA3 in factors:
        return _llama3_scaling(factors[LLAMA3], turned, _decimal(theta))
    if LONG in factors or SHORT in factors:
        return _longrope(factors, metadata.number(prefix + "attn_factor"))
    kind = metadata.text(prefix + "type")
    if kind in {None, "none"}:
        return None
    original = _optional(head, "rope.scaling.original_context_length")
    more: Fields = {} if original is None else {"original_max_position_embeddings": original}
    if kind == "yarn":
        found = {name: metadata.number(prefix + key) for name, key in _YARN.items()}
        more |= {name: _decimal(value) for name, value in found.items() if value is not None}
        if magnitude := metadata.number(prefix + "yarn_log_multiplier"):
            more |= {"mscale": 1.0, "mscale_all_dim": _decimal(magnitude)}
    factor = _needed(head, "rope.scaling.factor", metadata.number)
    return {"rope_type": kind, "factor": _decimal(factor)} | more


def _longrope(factors: Factors, magnitude: float | None) -> Fields:
    if LONG not in factors or SHORT not in factors:
        raise CorruptGguf(f"it has {LONG} or {SHORT}, and not the other")
    return {
        "rope_type": "longrope",
        "short_factor": list(map(_decimal, factors[SHORT])),
        "long_factor": list(map(_decimal, factors[LONG])),
    } | ({} if magnitude is None else {"attention_factor": _decimal(magnitude)})


def _llama3_scaling(factors: Floats, turned: int, theta: float) -> Fields:
    """The parameters that give these factors."""
    factor = _decimal(factors.max(initial=0))
    if len(factors) * 2 == turned:
        exponents = np.arange(len(factors)) / len(factors)
        with np.errstate(all="ignore"):
            wavelengths = 2 * np.pi * np.power(theta, exponents)
            turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
            low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
            ramp = np.clip((turns - low) / (high - low), 0, 1)
            expected = 1 / ((1 - ramp) / factor + ramp)
        if np.allclose(factors, expected, rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise CorruptGguf(f"its {LLAMA3} is not Llama 3's, which alone is supported")


def _has(head: GgufHead, name: str) -> bool:
    return any(tensor.name == name for tensor in head.tensors)


def _name(metadata: Metadata) -> str:
    return metadata.text(ARCHITECTURE_KEY) or ""


def _needed(head: GgufHead, key: str, read: Callable[[str], Number | None]) -> Number:
    """What `read` has of a key of the architecture's."""
    whole = f"{_name(head.metadata)}.{key}"
    value = read(whole)
    if value is None:
        raise CorruptGguf(f"its {whole} is missing")
    return value


def _size(head: GgufHead, key: str) -> int:
    return _needed(head, key, head.metadata.size)


def _optional(head: GgufHead, key: str) -> int | None:
    return head.metadata.size(f"{_name(head.metadata)}.{key}")


def _decimal(value: float) -> float:
    """What was stored in float32, by its shortest decimal."""
    return float(str(np.float32(value)))
