"""Sixty-four steps of a real model over encoded rows, beside the same over plain ones."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from pipeline.scx import KeyGenerator, encode_llama, split_kvcache_dynamic

MODEL = Path("models/smollm2")
PLAIN = {"permute": False, "dense": False}
# The last is what 64 steps may differ by: 4.5e-5 is what the paper reports for its float32.
MODES = {
    "permutation": ({**PLAIN, "permute": True}, 4.5e-5),
    "dense keys": ({**PLAIN, "dense": True}, 4.5e-5),
    "decoys": ({**PLAIN, "redundant_num": 16}, 4.5e-5),
    "noise": ({**PLAIN, "alp": 1.0}, 4.5e-5),
    "all": ({"redundant_num": 16, "alp": 1.0}, 1e-4),
}
PROMPT = (
    "The old lighthouse at the edge of the village had been dark for many years, until one winter "
    "a young keeper arrived with a box of letters and a plan. She"
)
PUBLIC = (
    "Photosynthesis is the process by which green plants use sunlight to make food from carbon "
    "dioxide and water. It takes place in the leaves."
)
NUM_STEPS = 64


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="SmolLM2 is not downloaded")
def test_a_real_model_says_the_same_over_encoded_rows():
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])
    expected, tokens = [], []
    with torch.no_grad():
        output = model(prompt, use_cache=True)
        for _ in range(NUM_STEPS):
            tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
            output = model(tokens[-1], past_key_values=output.past_key_values, use_cache=True)
            expected.append(output.logits)
    expected = torch.cat(expected, 1)
    for mode, (settings, error) in MODES.items():
        keys = KeyGenerator(1, 576, 64, seed=5, **settings)
        encode_llama(model, keys, decoy_ids=tokenizer.encode(PUBLIC).ids)
        cache = model(prompt, mode="prefill").past_key_values
        gpu, cpu = split_kvcache_dynamic(cache, gpu_layers=range(1, 29))
        found = model(torch.cat(tokens, 1), mode="decode", gpu_kvcache=gpu, cpu_kvcache=cpu).logits
        assert (found - expected).abs().max() < error, mode
        assert (found.argmax(-1) == expected.argmax(-1)).all(), mode
