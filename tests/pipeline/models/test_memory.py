"""A stage's peak memory stays near its own shard, whatever the model's size."""

import platform
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.kernels.kernel_selection import why_not_native

NUM_LAYERS, NUM_STAGES = 8, 4
SLACK = 1.15  # of the shard, beside one block of the file
BLOCK_BYTES = 16 << 20

# VmHWM is the peak of resident memory, which the kernel keeps; the imports are measured first.
LOAD = """
import os
import sys
from pathlib import Path
from pipeline.models.config import load_config
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.models.registry import load_shard, required_files
from pipeline.kernels.sealed_memory import SealedMemory
from pipeline.weights.checkpoint import hash_files

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

directory, start, end, dtype = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = load_config(directory)
hashes = hash_files(required_files(directory, config, range(start, end)))
why_not_native()  # its self-test runs what there is to run
before = peak()
memory = None
if sys.argv[5] == "sealed":
    memory = SealedMemory(os.memfd_create("weights", os.MFD_ALLOW_SEALING))
shard = load_shard(
    directory, config, start, end, dtype=dtype, expected_hashes=hashes, memory=memory
)
assert memory is None or memory.is_sealed
print(shard.num_weight_bytes, peak() - before)
"""


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory):
    """Eight layers of 25 MB, 250 MB in all, and half of that: by the type that is stored."""
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    directories = {}
    for stored in (torch.float32, torch.bfloat16):
        directories[stored] = tmp_path_factory.mktemp("wide")
        model.to(stored).save_pretrained(directories[stored])
    yield directories
    for directory in directories.values():
        (directory / "model.safetensors").unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "dtype", "stage", "memory"),
    [
        (torch.float32, "float32", 0, "own"),
        (torch.float32, "bfloat16", 1, "own"),
        (torch.float32, "int8", 2, "own"),
        (torch.bfloat16, "float32", 3, "own"),
        (torch.bfloat16, "int8", 1, "own"),
        pytest.param(
            *(torch.float32, "float32", 1, "sealed"),
            marks=pytest.mark.skipif(why_not_native() is not None, reason="native kernels' alone"),
        ),
    ],
)
def test_a_stages_peak_memory_is_near_its_shard(wide_models, stored, dtype, stage, memory):
    size = NUM_LAYERS // NUM_STAGES
    arguments = [wide_models[stored], stage * size, (stage + 1) * size, dtype, memory]
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    shard_bytes, peak_bytes = map(int, result.stdout.split())
    assert shard_bytes > 12e6  # two layers: the measure is about the shard, not about small change
    assert peak_bytes <= SLACK * shard_bytes + BLOCK_BYTES


# Keeps nothing of what it takes for a while; prints how much more memory it has than before.
FREE = """
import re
from pathlib import Path
import numpy as np
from pipeline.kernels.runtime import return_large_blocks

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

{first}
np.ones(2 << 20)  # glibc's own threshold is 16 MiB from here on
before = resident()
kept = [np.ones(1 << 18) for _ in range(9)]
small = [bytes(100_000) for _ in range(9)]
del kept
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(("first", "is_kept"), [("", True), ("return_large_blocks()", False)])
def test_large_blocks_are_given_back_when_they_are_freed(first, is_kept):
    code = FREE.format(first=first)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (int(result.stdout) > 9 << 20) is is_kept
