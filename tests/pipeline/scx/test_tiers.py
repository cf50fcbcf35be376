"""Layers of an encoded cache on disk and with an attention worker: the same logits."""

import pytest
import torch

from pipeline.scx import (
    AnswerRefused,
    AttentionTier,
    CacheRefused,
    EncodedKVCache,
    ScxError,
    encode_llama,
    split_kvcache_dynamic,
)
from pipeline.scx.attention_worker import AttentionMemory, AttentionWorker
from tests.pipeline.scx.test_attention_parts import Near
from tests.pipeline.scx.test_llama import encoded_logits, keys_of, llama, plain_logits, prompt_of

STEPS = 6
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


def tier(max_rows=64, memory=None):
    return AttentionTier(Near(AttentionWorker(AttentionMemory(memory))), max_rows)


@pytest.mark.parametrize("settings", [{}, {"redundant_num": 5}, {"one_time": True}], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["one text", "unequal lengths"])
@pytest.mark.parametrize("where", ["disk", "elsewhere", "all"])
def test_logits_are_those_of_a_plain_cache(tmp_path, where, mask, settings):
    prompt = prompt_of(1 if mask is None else len(mask))
    expected, tokens = plain_logits(llama(), prompt, STEPS, mask)
    model = encode_llama(llama(), keys_of(**settings, batch_size=2))
    disk = f"disk:{tmp_path}"
    placement = {
        "disk": {0: "disk", 1: disk}, "elsewhere": dict.fromkeys((0, 2), tier()),
        "all": {0: disk, 1: tier(), 2: "memory"},
    }[where]  # fmt: skip
    logits = encoded_logits(model, prompt, tokens, mask, placement)
    assert (logits - expected).abs().max() < 1e-4
    assert not list(tmp_path.iterdir())  # files go with their layers


def test_a_disk_that_is_full_says_so(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    cache = encode_llama(llama(), keys_of())(prompt_of(), mode="prefill").past_key_values
    with pytest.raises(ScxError, match=r"does not fit on disk: .*No space left"):
        split_kvcache_dynamic(cache, {1: "disk"})


def test_rows_altered_on_disk_are_refused():
    model = encode_llama(llama(), keys_of())
    prompt = prompt_of()
    cache = model(prompt, mode="prefill").past_key_values
    gpu, cpu = split_kvcache_dynamic(cache, {1: "disk"})
    gpu.layers[1].room[0, 0, 0, 3, 0] += 1
    with pytest.raises(CacheRefused):
        model(input_ids=prompt[:, :1], mode="decode", gpu_kvcache=gpu, cpu_kvcache=cpu)


def test_a_worker_that_is_full_says_so():
    cache = encode_llama(llama(), keys_of())(prompt_of(), mode="prefill").past_key_values
    with pytest.raises(ScxError, match=r"the tier cannot be had: .* left of its memory"):
        split_kvcache_dynamic(cache, {1: tier(memory=1000)})


def test_what_lies_elsewhere_cannot_be_written_from_here(tmp_path):
    cache = encode_llama(llama(), keys_of())(prompt_of(), mode="prefill").past_key_values
    elsewhere, _ = split_kvcache_dynamic(cache, {1: tier()})
    with pytest.raises(ScxError, match="layer 1 lies elsewhere"):
        elsewhere.save(tmp_path / "cache")
    assert isinstance(elsewhere, EncodedKVCache)


def test_a_worker_that_refuses_in_the_midst_ends_the_step():
    model = encode_llama(llama(), keys_of())
    prompt = prompt_of()
    place = tier(max_rows=prompt.shape[1])
    gpu, cpu = split_kvcache_dynamic(model(prompt, mode="prefill").past_key_values, {1: place})
    with pytest.raises(AnswerRefused, match="is none"):
        model(input_ids=prompt[:, :1], mode="decode", gpu_kvcache=gpu, cpu_kvcache=cpu)
