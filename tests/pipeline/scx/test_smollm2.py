"""Sixty-four steps of a real model over encoded rows, beside the same over plain ones."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from pipeline.models.config import load_config
from pipeline.models.layer_parts import OWN
from pipeline.models.registry import load_shard
from pipeline.scx import KeyGenerator, encode_llama, split_kvcache_dynamic
from pipeline.scx.attention_parts import AttentionParts, Encoding
from pipeline.scx.encoded_memory import EncodedMemory
from tests.pipeline.oracles import Pipeline
from tests.pipeline.scx.test_attention_parts import opened

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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.exists(), reason="SmolLM2 is not downloaded"),
]


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


def pipeline_of(config, parts):
    shard = load_shard(MODEL, config, 0, config.num_layers, parts=parts, expected_hashes=None)
    return Pipeline([shard])


@pytest.fixture(scope="module")
def plain():
    """Tokens of the prompt, and the tokens and logits that follow."""
    config = load_config(MODEL)
    ids = torch.tensor(Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(PROMPT).ids)
    return config, ids, *pipeline_of(config, OWN).greedy(ids, NUM_STEPS)


# A model whose attention's outputs are off by one rounding differs by up to 1e-4 as well.
@pytest.mark.parametrize(
    "encoding",
    [
        {}, {"noise": 1.0}, {"num_decoys": 16}, {"is_one_time": True},
        {"noise": 1.0, "num_decoys": 16, "is_one_time": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_mode_says_what_the_plain_model_says(plain, encoding):
    config, ids, expected, expected_logits = plain
    parts = AttentionParts(config, Encoding(**encoding))
    pipeline = pipeline_of(config, parts)
    opened(parts, max_rows=len(ids) + NUM_STEPS)
    tokens, logits = pipeline.greedy(ids, NUM_STEPS)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() < 1e-4


def test_stages_that_are_handed_keys_say_what_plain_ones_say(plain):
    config, ids, expected, expected_logits = plain
    parts = EncodedMemory(config)
    parts.use(bytes(32))
    tokens, logits = pipeline_of(config, parts).greedy(ids, NUM_STEPS)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() < 1e-4
