"""Tiny models of each family, as transformers makes them: three configurations each.

Among them the odd ones: heads that are not hidden / heads wide, no grouped heads, a window shorter
than the prompt, tied and untied heads, every way in which rotary positions are stretched.
"""

from collections.abc import Callable
from copy import deepcopy

import transformers
from transformers import PreTrainedModel

BASE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_GROUPS = {"num_key_value_heads": 4}
WIDE = {"head_dim": 32}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
}


# model_type -> transformers' name -> what differs from BASE, of each configuration
FAMILIES: dict[str, tuple[str, list[dict]]] = {
    "qwen3": ("Qwen3", [WIDE | TIED, NO_GROUPS | UNTIED | {"attention_bias": True},
        UNTIED | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}]),
    "mistral": ("Mistral", [WIDE | {"sliding_window": None, "rope_parameters": YARN},
        NO_GROUPS | TIED | {"sliding_window": 9}, {"sliding_window": 200}]),
    "ministral": ("Ministral", [WIDE | TYPES | {"sliding_window": 7},
        NO_GROUPS | TIED | {"sliding_window": 9},
        {"sliding_window": 7, "layer_types": ["full_attention"] * 3}]),
    "olmo2": ("Olmo2", [{}, NO_GROUPS | TIED | {"attention_bias": True},
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}]),
    "olmo3": ("Olmo3", [TYPES | {"sliding_window": 7}, NO_GROUPS | TIED | {"sliding_window": 9},
        {"num_hidden_layers": 4, "sliding_window": 7,
         "rope_parameters": {"full_attention": YARN, "sliding_attention": {
             "rope_type": "default", "rope_theta": 500.0}}}]),
    "phi3": ("Phi3", [{"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        NO_GROUPS | TIED | {"sliding_window": 9},
        {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE}]),
    "gemma3_text": ("Gemma3Text", [
        WIDE | TYPES | {"sliding_window": 7, "query_pre_attn_scalar": 24},
        NO_GROUPS | UNTIED | {"sliding_window": 9, "query_pre_attn_scalar": 16},
        {"num_hidden_layers": 6, "sliding_window": 5, "num_key_value_heads": 1,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0,
                                                "rope_theta": 5000.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}]),
    "mixtral": ("Mixtral", [WIDE | {"num_local_experts": 4}, NO_GROUPS | TIED | {
        "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 9},
        {"num_local_experts": 8, "num_experts_per_tok": 3}]),
    "qwen3_moe": ("Qwen3Moe", [
        WIDE | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        NO_GROUPS | TIED | {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True,
                            "moe_intermediate_size": 32, "mlp_only_layers": [1]},
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
         "decoder_sparse_step": 2}]),
    "gpt_oss": ("GptOss", [
        WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7,
                "rope_parameters": YARN},
        NO_GROUPS | TIED | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 9,
                            "swiglu_limit": 0.5, "swiglu_alpha": 0.7,
                            "rope_parameters": YARN | {"truncate": False}},
        {"hidden_size": 96, "num_attention_heads": 14, "num_local_experts": 8,
         "num_experts_per_tok": 4, "attention_bias": False, "rope_parameters": None,
         "swiglu_limit": 2.0,
         "layer_types": ["full_attention"] * 3}]),
}  # fmt: skip
NO_HEAD_DIM = ("olmo2", "olmo3", "phi3")
CASES = [f"{family}-{index}" for family in FAMILIES for index in range(3)]


def make_model(case: str) -> PreTrainedModel:
    """The model of a case, with transformers' own numbers in it."""
    family, _, index = case.rpartition("-")
    name, changes = FAMILIES[family]
    fields = deepcopy(BASE | changes[int(index)])  # transformers writes into what it is given
    if family in NO_HEAD_DIM:  # always hidden / heads
        del fields["head_dim"]
    config_class = getattr(transformers, f"{name}Config")
    model_class: Callable = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    return model_class(config_class(**fields))
