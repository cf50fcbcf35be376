"""A Llama that decodes over an encoded cache says what it says over a plain one."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.scx import (
    CacheRefused,
    EncodedKVCache,
    KeyGenerator,
    ScxError,
    SCXKeyGenerator,
    encode_llama,
    split_kvcache_dynamic,
)

SEED = bytes(range(32))
PLAIN = {"permute": False, "dense": False}
MODES = {
    "permutation": {**PLAIN, "permute": True},
    "dense keys": {**PLAIN, "dense": True},
    "decoys": {**PLAIN, "redundant_num": 6},
    "noise": {**PLAIN, "alp": 1.0},
    "all": {"redundant_num": 6, "alp": 1.0},
    "all and one-time keys": {"redundant_num": 6, "alp": 1.0, "one_time": True},
}


def llama(num_kv_heads=2, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=100, num_hidden_layers=3, hidden_size=64, intermediate_size=96,
        num_attention_heads=4, num_key_value_heads=num_kv_heads, max_position_embeddings=256,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def keys_of(**changed):
    return KeyGenerator(**{
        "seq_len": 5, "hidden_dim": 64, "qk_hidden_dim": 16, "seed": SEED,
        "decode_start_layers": [0], "decode_end_layers": [2], **changed,
    })  # fmt: skip


def prompt_of(num_sequences=1, num_tokens=9):
    torch.manual_seed(5)
    return torch.randint(0, 100, (num_sequences, num_tokens))


def plain_logits(model, prompt, num_steps, mask=None):
    """Of each step, with the tokens that were chosen."""
    with torch.no_grad():
        output = model(prompt, attention_mask=mask, use_cache=True)
        logits, tokens = [output.logits[:, -1]], []
        for _ in range(num_steps):
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            if mask is not None:
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            output = model(
                tokens[-1], attention_mask=mask, past_key_values=output.past_key_values,
                use_cache=True,
            )  # fmt: skip
            logits.append(output.logits[:, -1])
    return torch.stack(logits, 1), torch.cat(tokens, 1)


def encoded_logits(model, prompt, tokens, mask=None, gpu_layers=(1,)):
    output = model(prompt, attention_mask=mask, mode="prefill")
    logits = [output.logits[:, -1]]
    gpu, cpu = split_kvcache_dynamic(output.past_key_values, gpu_layers=gpu_layers)
    for at in range(tokens.shape[1]):
        where = prompt.shape[1] + at
        output = model(
            input_ids=tokens[:, at : at + 1], mode="decode", use_cache=True,
            cache_position=torch.arange(where, where + 1), gpu_kvcache=gpu, cpu_kvcache=cpu,
        )  # fmt: skip
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


def test_the_quick_start_runs():
    config = LlamaConfig(
        vocab_size=1000, num_hidden_layers=3, hidden_size=64, num_attention_heads=4,
        intermediate_size=96,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().half()
    with torch.no_grad():
        expected = model(torch.zeros(1, 10, dtype=torch.long)).logits
    key_generator = SCXKeyGenerator(
        seq_len=10,
        hidden_dim=64,
        qk_hidden_dim=16,
        redundant_num=0,
        alp=False,
        batch_size=1,
        decode_start_layers=[0],
        decode_end_layers=[2],
    )
    encode_llama(model, key_generator)
    input_ids = torch.randint(0, 1000, (1, 10))
    output = model(input_ids, mode="prefill")
    logits = output.logits
    kvcache = output.past_key_values
    gpu_kvcache, cpu_kvcache = split_kvcache_dynamic(kvcache, gpu_layers=[1])
    for step in range(5):
        next_token_id = torch.argmax(logits[:, -1, :], dim=-1, keepdim=True)
        past_seen_tokens = 10 + step
        cache_position = torch.arange(past_seen_tokens, past_seen_tokens + 1)
        output = model(
            input_ids=next_token_id,
            use_cache=True,
            mode="decode",
            cache_position=cache_position,
            gpu_kvcache=gpu_kvcache,
            cpu_kvcache=cpu_kvcache,
        )
        logits = output.logits
    assert logits.shape == (1, 1, 1000)
    assert gpu_kvcache.get_seq_length() == cpu_kvcache.get_seq_length() == 15
    orig_logits = model(input_ids).logits
    scx_logits = model(input_ids, mode="prefill").logits
    assert torch.max(torch.abs(orig_logits - scx_logits)).item() == 0
    assert (model(torch.zeros(1, 10, dtype=torch.long)).logits == expected).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_kv_heads", [4, 2], ids=["each its own", "shared"])
def test_decoding_over_encoded_rows_gives_the_plain_logits(mode, num_kv_heads):
    model = llama(num_kv_heads)
    prompt = prompt_of()
    expected, tokens = plain_logits(model, prompt, 5)
    encode_llama(model, keys_of(**MODES[mode]))
    found = encoded_logits(model, prompt, tokens)
    assert (found - expected).abs().max() < 4.5e-5
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    held = model(prompt, mode="prefill").past_key_values.layers[1].keys
    plain = model(prompt, use_cache=True).past_key_values.layers[1].keys
    assert held.shape != plain.shape or not torch.allclose(held, plain, atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_unequal_lengths_decodes_as_it_does_plain(side):
    model = llama()
    prompt = prompt_of(3)
    mask = torch.ones_like(prompt)
    for at, num_masked in enumerate((0, 3, 7)):
        mask[at, slice(num_masked) if side == "left" else slice(9 - num_masked, None)] = 0
    expected, tokens = plain_logits(model, prompt, 5, mask)
    encode_llama(model, keys_of(batch_size=4, redundant_num=6, alp=1.0))
    found = encoded_logits(model, prompt, tokens, mask)
    assert (found - expected)[:, 1:].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-10), (torch.float16, 0.05), (torch.bfloat16, 0.4)]
)
def test_other_numbers_are_as_near_as_they_are_exact(dtype, error):
    model = llama(dtype=dtype)
    prompt = prompt_of()
    expected, tokens = plain_logits(model, prompt, 4)
    encode_llama(model, keys_of(**MODES["all"]))
    found = encoded_logits(model, prompt, tokens)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < error


@pytest.mark.slow
def test_another_process_decodes_what_this_one_encoded(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    prompt = prompt_of()
    expected, tokens = plain_logits(model, prompt, 2)
    encode_llama(model, keys_of(**MODES["all"]))
    model(prompt, mode="prefill").past_key_values.save(tmp_path / "cache")
    torch.save((tokens, expected), tmp_path / "expected")
    program = f"""
import torch
from transformers import LlamaForCausalLM
from pipeline.scx import EncodedKVCache, KeyGenerator, encode_llama
model = LlamaForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
encode_llama(model, KeyGenerator(1, 64, 16, 6, 1.0, seed={SEED!r}))
cache = EncodedKVCache.load({str(tmp_path / "cache")!r})
tokens, expected = torch.load({str(tmp_path / "expected")!r})
found = model(input_ids=tokens, mode="decode", gpu_kvcache=cache).logits
assert (found - expected[:, 1:]).abs().max() < 1e-4
print("same")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.stdout == b"same\n", done.stderr


def test_generate_is_as_it_was():
    model = llama()
    before = model.generate(prompt_of(), max_new_tokens=5, do_sample=False)
    encode_llama(model, keys_of())
    assert (model.generate(prompt_of(), max_new_tokens=5, do_sample=False) == before).all()


def step(model, *caches, where=9, **changed):
    return model(
        input_ids=torch.zeros(1, 1, dtype=torch.long), mode="decode",
        cache_position=torch.tensor([where]),
        **dict(zip(("gpu_kvcache", "cpu_kvcache"), caches, strict=False)), **changed,
    )  # fmt: skip


@pytest.fixture
def prefilled():
    model = llama()
    encode_llama(model, keys_of(**MODES["all"]))
    return model, *split_kvcache_dynamic(model(prompt_of(), mode="prefill").past_key_values, [1])


ALTERED = {
    "a number": lambda held: held.keys[0, 0, 3].add_(1),
    "another value": lambda held: held.values[0, 0, 3].mul_(2),
    "rows swapped": lambda held: held.keys[0, 0].copy_(held.keys[0, 0].flip(0)),
    "truncated": lambda held: replace(held, keys=held.keys[:, :, 1:], values=held.values[:, :, 1:]),
    "another shape": lambda held: replace(held, keys=held.keys[..., 1:]),
    "other numbers": lambda held: replace(held, keys=held.keys.int(), values=held.values.int()),
    "no sequence": lambda held: replace(held, receipts=()),
    "another receipt": lambda held: replace(
        held, receipts=(replace(held.receipts[0], digest=bytes(32)),)
    ),
    "shifted": lambda held: replace(held, receipts=(replace(held.receipts[0], num_padding=1),)),
}


@pytest.mark.parametrize("alteration", ALTERED)
@pytest.mark.parametrize("after", [0, 1], ids=["at once", "after a step"])
def test_an_altered_cache_is_refused_and_left_as_it_is(prefilled, alteration, after):
    model, gpu, cpu = prefilled
    for at in range(after):
        step(model, gpu, cpu, where=9 + at)
    changed = ALTERED[alteration](gpu.layers[1])
    if not isinstance(changed, torch.Tensor):
        gpu.layers[1] = changed
    before = gpu.layers[1], cpu.layers[0]
    with pytest.raises(CacheRefused) as caught:
        step(model, gpu, cpu, where=9 + after)
    assert "\n" not in str(caught.value)
    assert (gpu.layers[1], cpu.layers[0]) == before


def test_a_cache_that_is_rolled_back_is_refused(prefilled):
    model, gpu, cpu = prefilled
    older = EncodedKVCache(gpu.layers), EncodedKVCache(cpu.layers)
    step(model, gpu, cpu)
    with pytest.raises(CacheRefused):
        step(model, older[0], cpu, where=10)
    with pytest.raises(CacheRefused):
        step(model, *older, where=10)
    step(model, gpu, cpu, where=10)


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"session": b"other"}, {"epoch": 1}, {"alp": 0.5}], ids=str
)
def test_keys_of_another_seed_session_or_epoch_refuse_the_cache(prefilled, changed):
    model, gpu, cpu = prefilled
    encode_llama(model, keys_of(**{**MODES["all"], **changed}))
    with pytest.raises(CacheRefused):
        step(model, gpu, cpu)


def test_another_model_refuses_the_cache(prefilled):
    _, gpu, cpu = prefilled
    other = llama(seed=1)
    encode_llama(other, keys_of(**MODES["all"]))
    with pytest.raises(CacheRefused):
        step(other, gpu, cpu)


def test_an_epoch_encodes_the_same_text_otherwise():
    model = llama()
    held = []
    for epoch in range(2):
        encode_llama(model, keys_of(epoch=epoch))
        held.append(model(prompt_of(), mode="prefill").past_key_values.layers[0].keys)
    assert not torch.allclose(*held, atol=1e-2)


def test_layers_lie_where_the_map_says():
    model = llama()
    encode_llama(model, keys_of())
    cache = model(prompt_of(), mode="prefill").past_key_values
    gpu, cpu = split_kvcache_dynamic(cache, gpu_layers={0: "memory", 2: "meta"})
    assert (sorted(gpu.layers), sorted(cpu.layers)) == ([0, 2], [1])
    assert gpu.layers[2].keys.device.type == "meta"
    default, _ = split_kvcache_dynamic(cache)
    assert sorted(default.layers) == [1]
    for bad in ([7], {1: "nowhere"}, {1: "cuda:99"}, 3):
        with pytest.raises(ScxError):
            split_kvcache_dynamic(cache, gpu_layers=bad)


def test_misuse_is_one_clear_error(prefilled, tmp_path):
    model, gpu, cpu = prefilled
    ids = prompt_of()
    misuses = [
        lambda: model(ids, mode="train"),
        lambda: model(ids, torch.ones_like(ids), mode="prefill"),
        lambda: model(ids, mode="prefill", past_key_values=object()),
        lambda: model(ids[0], mode="prefill"),
        lambda: model(ids[:, :0], mode="prefill"),
        lambda: model(ids.repeat(2, 1), mode="prefill"),
        lambda: model(ids, attention_mask=torch.zeros_like(ids), mode="prefill"),
        lambda: step(model, gpu),
        lambda: step(model, gpu, gpu),
        lambda: step(model),
        lambda: step(model, gpu, cpu, where=12),
        lambda: step(model, gpu, cpu, attention_mask=torch.ones(1, 4)),
        lambda: encode_llama(torch.nn.Linear(2, 2), keys_of()),
        lambda: encode_llama(llama(), keys_of(qk_hidden_dim=8)),
        lambda: encode_llama(llama(), keys_of(hidden_dim=128)),
        lambda: encode_llama(llama(), keys_of(decode_end_layers=[3])),
        lambda: encode_llama(llama(), keys_of(redundant_num=4), decoy_ids=[1, 2]),
        lambda: encode_llama(llama(), keys_of(redundant_num=1), decoy_ids=[1, 200]),
        lambda: EncodedKVCache.load(tmp_path / "none"),
        lambda: gpu.save(tmp_path / "none" / "cache"),
    ]
    for misuse in misuses:
        with pytest.raises(ScxError) as caught:
            misuse()
        assert "\n" not in str(caught.value)
    step(model, gpu, cpu)
