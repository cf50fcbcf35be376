"""More requests than the stages' KV memory holds, on real processes."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import new_cluster

NUM_TOKENS = 220
# As many as run at once begin beside each other, and cannot end so.
PROMPTS = [[10 + index] * 100 for index in range(12)]
# For 2,097 tokens in the stage of two layers.
MEMORY = ("--kv-memory", "0.001")
SEEDED = {"temperature": 0.9, "seed": 11}


def test_requests_give_way_and_a_stage_dies_and_every_text_is_what_it_is_alone(cluster):
    cluster.plan(3)
    for idx in range(3):
        cluster.start_worker(idx, *MEMORY)
    server = cluster.serve("--prefix-share", "0")
    alone = [server.text(prompt, NUM_TOKENS) for prompt in PROMPTS]
    seeded = server.text(PROMPTS[0], NUM_TOKENS, **SEEDED)

    def num_given_way():
        return server.pipeline()["engine"]["num_given_way"]

    def together():
        return server.post(server.wish(PROMPTS, NUM_TOKENS)).json()["choices"]

    assert num_given_way() == 0
    with ThreadPoolExecutor() as pool:
        texts = pool.submit(together)
        another = pool.submit(server.text, PROMPTS[0], NUM_TOKENS, **SEEDED)
        server.wait_for(num_given_way)
        cluster.workers[1].kill()
        cluster.start_worker(1, *MEMORY)
        assert [choice["text"] for choice in texts.result()] == alone
        assert another.result() == seeded
    engine = server.pipeline()["engine"]
    assert (engine["num_running"], engine["num_waiting"], engine["held_tokens"]) == (0, 0, 0)
    assert "veilpipe_requests_given_way_total" in server.get("/metrics").text
    server.stop()


class Memory:
    """Bytes of a process that lie in memory."""

    def __init__(self, pid):
        self._directory = Path(f"/proc/{pid}")

    def now(self):
        return self._status("VmRSS")

    def begin(self):
        """Forget what has been most."""
        (self._directory / "clear_refs").write_text("5")

    def most(self):
        return self._status("VmHWM")

    def _status(self, name):
        text = (self._directory / "status").read_text()
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text)[1])


@pytest.fixture
def wide_cluster(tmp_path, tiny_model, command_parent):
    """Of a model that computes little and keeps a lot: 64 KiB of a token in each of two stages."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path / "wide"
    shutil.copytree(tiny_model, directory)
    raw = json.loads((directory / "config.json").read_text())
    torch.manual_seed(8)
    wide = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    wide |= {"num_hidden_layers": 16}
    LlamaForCausalLM(LlamaConfig(**(raw | wide))).save_pretrained(directory)
    with new_cluster(tmp_path, directory, command_parent) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_crowd_has_its_texts_in_the_memory_that_there_is_and_gives_it_back(wide_cluster):
    cluster, kv_bytes = wide_cluster, 1000 * 65536
    cluster.plan(2)
    for idx in range(2):
        cluster.start_worker(idx, "--kv-memory", str(kv_bytes / 2**30))
    server = cluster.serve("--prefix-share", "0", "--max-batch", "16")
    wanted = [([10 + index] * 20, {"temperature": index % 2, "seed": index}) for index in range(16)]

    def text(prompt, sampling):
        body = server.wish(prompt, 125, **sampling)
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=900)
        return answer.json()["choices"][0]["text"]

    alone = [text(*each) for each in wanted]
    engine = server.pipeline()["engine"]
    assert (engine["pool_tokens"], engine["num_given_way"]) == (1000, 0)
    memories = [Memory(process.pid) for process in cluster.workers.values()]
    before = [memory.now() for memory in memories]
    for memory in memories:
        memory.begin()
    with ThreadPoolExecutor(64) as pool:
        texts = [pool.submit(text, *each) for each in 4 * wanted]
        assert [each.result() for each in texts] == 4 * alone
    assert server.pipeline()["engine"]["num_given_way"] > 0
    for memory, was in zip(memories, before, strict=True):
        assert was + 0.5 * kv_bytes < memory.most() <= was + kv_bytes + 100 * 2**20
        server.wait_for(lambda memory=memory, was=was: memory.now() < was + 0.2 * kv_bytes)
    server.stop()
