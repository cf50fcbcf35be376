"""Configurations of published models mean what they mean to transformers: tensors, windows, angles.

Each is a model's config.json, but for what nobody reads and for layers beyond the first few.
"""

import importlib
import json

import numpy as np
import pytest
import torch
import transformers

from pipeline.models.config import load_config
from pipeline.models.registry import plan_tensors
from pipeline.models.rope import rope_frequencies

FACTORS = [1.0 + each / 10 for each in range(48)]
LONGROPE = {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]}
FIVE_TO_ONE = (["sliding_attention"] * 5 + ["full_attention"]) * 3
THREE_TO_ONE = (["sliding_attention"] * 3 + ["full_attention"]) * 8


def fields(model_type, vocab, hidden, inner, layers, heads, kv_heads, positions, **others):
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "pad_token_id": None,
    } | others


def gpt_oss(layers, experts):
    return fields("gpt_oss", 201088, 2880, 2880, layers, 64, 8, 131072, head_dim=64,
        attention_bias=True, experts_per_token=4, hidden_act="silu", initial_context_length=4096,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2), rms_norm_eps=1e-5,
        num_experts_per_tok=4, num_local_experts=experts, rope_theta=150000, sliding_window=128,
        swiglu_limit=7.0, tie_word_embeddings=False, rope_scaling={
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
            "original_max_position_embeddings": 4096, "truncate": False},
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head"]})  # fmt: skip


PUBLISHED = {
    "Qwen3-0.6B": fields("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, head_dim=128,
        rope_theta=1000000, rope_scaling=None, sliding_window=None, max_window_layers=28,
        use_sliding_window=False, tie_word_embeddings=True, attention_bias=False),
    "Mistral-7B-v0.1": fields("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, rope_theta=10000.0,
        rms_norm_eps=1e-5, sliding_window=4096, tie_word_embeddings=False),
    "Mistral-7B-v0.3": fields("mistral", 32768, 4096, 14336, 32, 32, 8, 32768, rope_theta=1e6,
        rms_norm_eps=1e-5, sliding_window=None, tie_word_embeddings=False),
    "Mistral-Nemo": fields("mistral", 131072, 5120, 14336, 40, 32, 8, 131072, head_dim=128,
        rope_theta=1e6, rms_norm_eps=1e-5, sliding_window=None, tie_word_embeddings=False),
    "Ministral-8B": fields("mistral", 131072, 4096, 12288, 36, 32, 8, 32768, head_dim=128,
        rope_theta=1e8, rms_norm_eps=1e-5, sliding_window=32768, tie_word_embeddings=False),
    "OLMo-2-1124-7B": fields("olmo2", 100352, 4096, 11008, 32, 32, 32, 4096, rope_theta=500000,
        rms_norm_eps=1e-6, attention_bias=False, rope_scaling=None, tie_word_embeddings=False),
    "Olmo-3-7B": fields("olmo3", 100278, 4096, 11008, 32, 32, 32, 65536, rope_theta=500000,
        rms_norm_eps=1e-6, attention_bias=False, sliding_window=4096, tie_word_embeddings=False,
        layer_types=THREE_TO_ONE, rope_scaling={
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
            "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn"}),
    "Phi-3-mini-4k": fields("phi3", 32064, 3072, 8192, 32, 32, 32, 4096, rope_theta=10000.0,
        original_max_position_embeddings=4096, rope_scaling=None, sliding_window=2047),
    "Phi-3-mini-128k": fields("phi3", 32064, 3072, 8192, 32, 32, 32, 131072, rope_theta=10000.0,
        original_max_position_embeddings=4096, rope_scaling=LONGROPE, sliding_window=262144),
    "Phi-4": fields("phi3", 100352, 5120, 17920, 40, 40, 10, 16384, rope_theta=250000,
        original_max_position_embeddings=16384, rope_scaling=None, sliding_window=None),
    "Phi-4-mini": fields("phi3", 200064, 3072, 8192, 32, 24, 8, 131072, rope_theta=10000.0,
        original_max_position_embeddings=4096, rope_scaling=LONGROPE, sliding_window=262144,
        partial_rotary_factor=0.75, tie_word_embeddings=True),
    "Gemma-3-270M": fields("gemma3_text", 262144, 640, 2048, 18, 4, 1, 32768, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rope_theta=1000000.0,
        rope_local_base_freq=10000.0, rope_scaling=None, sliding_window=512,
        layer_types=FIVE_TO_ONE, _sliding_window_pattern=6, attn_logit_softcapping=None,
        final_logit_softcapping=None, use_bidirectional_attention=False),
    "Gemma-3-1B": fields("gemma3_text", 262144, 1152, 6912, 26, 4, 1, 32768, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rope_theta=1000000,
        rope_local_base_freq=10000, rope_scaling=None, sliding_window=512,
        sliding_window_pattern=6, attn_logit_softcapping=None, final_logit_softcapping=None),
    "Mixtral-8x7B": fields("mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, rope_theta=1e6,
        rms_norm_eps=1e-5, sliding_window=None, num_local_experts=8, num_experts_per_tok=2),
    "Qwen3-30B-A3B": fields("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 40960, head_dim=128,
        rope_theta=1000000.0, rope_scaling=None, sliding_window=None, use_sliding_window=False,
        max_window_layers=48, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    "gpt-oss-20b": gpt_oss(24, 32),
    "gpt-oss-120b": gpt_oss(36, 128),
}  # fmt: skip
NUM_LAYERS = 6


@pytest.fixture(params=PUBLISHED)
def both(request, tmp_path):
    """Our configuration, and a model of transformers that has no memory."""
    found = json.loads(json.dumps(PUBLISHED[request.param])) | {"num_hidden_layers": NUM_LAYERS}
    if "layer_types" in found:
        found["layer_types"] = found["layer_types"][:NUM_LAYERS]
    (tmp_path / "config.json").write_text(json.dumps(found))
    config = load_config(tmp_path)
    reference = transformers.AutoConfig.from_pretrained(tmp_path)
    reference.quantization_config = None  # how it packs weights that it does not have here
    with torch.device("meta"):
        return config, transformers.AutoModelForCausalLM.from_config(reference)


def test_the_tensors_are_those_of_transformers(both):
    config, model = both
    planned = {
        name: tuple(sink.shape)
        for name, sink in plan_tensors(config, range(config.num_layers)).items()
    }
    expected = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    if any(".experts.0." in name for name in planned):  # which transformers holds as one, and so
        # writes and reads one by one
        planned = {name: shape for name, shape in planned.items() if ".layers." not in name}
        expected = {name: shape for name, shape in expected.items() if ".layers." not in name}
    assert planned == expected


def test_each_layers_window_is_that_of_transformers(both):
    config, model = both
    own = model.config
    for layer in range(config.num_layers):
        types = getattr(own, "layer_types", None)
        has_window = types is None or types[layer] == "sliding_attention"
        expected = getattr(own, "sliding_window", None) if has_window else None
        assert (config.shape(layer).heads.window or None) == expected


def test_each_layer_turns_heads_as_transformers_does(both):
    config, model = both
    own = model.config
    kind = type(model).__module__
    classes = vars(importlib.import_module(kind))
    (name,) = (each for each in classes if each.endswith("RotaryEmbedding"))
    rotary = classes[name](config=own)
    for layer in range(config.num_layers):
        types = getattr(own, "layer_types", None)
        prefix = f"{types[layer]}_" if hasattr(rotary, "layer_types") else ""
        rope = config.shape(layer).rope.within(1)
        expected = getattr(rotary, f"{prefix}inv_freq").numpy()
        assert np.abs(rope_frequencies(rope) / expected - 1).max() <= 1e-6
        amplitude = 1.0 if rope.scaling is None else rope.scaling.amplitude
        assert abs(amplitude - getattr(rotary, f"{prefix}attention_scaling")) <= 1e-9
