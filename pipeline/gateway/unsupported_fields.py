"""Request fields beyond those that are implemented: which may be there, and with what value.

A field with an effect that is not implemented is refused by name, for its effect would be missed.
Accepted is what by definition changes no answer here, and the value with which a field has no
effect, since clients send their defaults. None always means that a field is not given.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.gateway.errors import unsupported

# What concerns bookkeeping, prices, caches and abuse: no answer depends on it.
HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
     "prompt_cache_retention", "cache_prompt", "parallel_tool_calls"}
)  # fmt: skip

_OFF = (False,)
_ZERO = (0,)
_ONE = (1,)
_NONE_LEFT: tuple[object, ...] = ([],)

# The values without effect of what OpenAI, vLLM, llama.cpp's server and their relatives know.
WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    # OpenAI
    "tools": _NONE_LEFT,
    "functions": _NONE_LEFT,
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "suffix": ("",),
    # vLLM
    "best_of": _ONE,
    "use_beam_search": _OFF,
    "length_penalty": _ONE,
    "early_stopping": _OFF,
    "logits_processors": _NONE_LEFT,
    "documents": _NONE_LEFT,
    "priority": _ZERO,
    "detokenize": (True,),
    "guided_decoding_backend": ("auto", "guidance"),
    "spaces_between_special_tokens": (True,),
    "include_reasoning": (True,),
    "return_tokens_as_token_ids": _OFF,
    "return_token_ids": _OFF,
    "repetition_detection": _OFF,
    # llama.cpp's server, text-generation-webui
    "n_predict": (-1,),
    "n_keep": _ZERO,
    "n_discard": _ZERO,
    "n_indent": _ZERO,
    "n_probs": _ZERO,
    "min_keep": _ZERO,
    "id_slot": (-1,),
    "t_max_predict_ms": _ZERO,
    "repeat_penalty": _ONE,
    "penalize_nl": _OFF,
    "typical_p": _ONE,
    "typical": _ONE,
    "tfs": _ONE,
    "tfs_z": _ONE,
    "top_a": _ZERO,
    "top_n_sigma": (-1, 0),
    "epsilon_cutoff": _ZERO,
    "eta_cutoff": _ZERO,
    "dynatemp_range": _ZERO,
    "dynatemp_exponent": _ONE,
    "xtc_probability": _ZERO,
    "dry_multiplier": _ZERO,
    "mirostat": _ZERO,
    "mirostat_mode": _ZERO,
    "smoothing_factor": _ZERO,
    "num_beams": _ONE,
    "samplers": _NONE_LEFT,
    "image_data": _NONE_LEFT,
    "lora": _NONE_LEFT,
    "response_fields": _NONE_LEFT,
    "post_sampling_probs": _OFF,
    "return_tokens": _OFF,
    "return_progress": _OFF,
    "timings_per_token": _OFF,
    "reasoning_format": ("none", "auto"),
}

# Of one message. Clients send back what they were given, whole.
MESSAGE_HARMLESS = frozenset({"id", "annotations", "cache_control", "timestamp"})
MESSAGE_WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {"tool_calls": _NONE_LEFT}

STREAM_WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "include_obfuscation": _OFF,
    "continuous_usage_stats": _OFF,
}


def check_fields(
    fields: Mapping[str, Any],
    without_effect: Mapping[str, tuple[object, ...]],
    harmless: frozenset[str] = frozenset(),
    where: str = "",
) -> None:
    """Raise ApiError that names the first field whose effect would be missed."""
    for name, value in fields.items():
        if value is None or name in harmless:
            continue
        # 1 and True are equal in Python, not in JSON; 1 and 1.0 are the same number in both.
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in without_effect.get(name, ())
        ):
            raise unsupported(f"{where}{name[:100]}")
