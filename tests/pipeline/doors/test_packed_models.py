"""Models in a few bits behind a door say what they say on a pipeline of one's own."""

import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.stage.step_executor import StageCore
from tests.pipeline.doors.rig import LIMITS, Model, Wire, generate
from tests.pipeline.gguf_files import Types, write_gguf
from tests.pipeline.oracles import randomise
from tests.pipeline.weights.test_packings import SHAPE, Packed

# What makes a Llama one of Llama 3.1, whose server in AWQ stood behind such a door.
LLAMA_31 = {
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "eos_token_id": [2, 3, 4],
}  # fmt: skip


def awq(root):
    packed = Packed(root, "awq", **LLAMA_31)
    return packed.directory, packed.floats


def gguf(root):
    torch.manual_seed(0)
    floats = root / "floats"
    randomise(LlamaForCausalLM(LlamaConfig(**SHAPE))).save_pretrained(floats)
    meaning = write_gguf(floats, root / "model.gguf", lambda _: Types.Q8_0)
    save_file(meaning, floats / "model.safetensors")
    return root / "model.gguf", floats


@pytest.mark.parametrize("make", [awq, gguf])
async def test_a_door_to_packed_layers_says_what_a_pipeline_of_ones_own_says(make, tmp_path):
    packed, floats = map(Model, make(tmp_path))
    core = StageCore(floats.whole(), LIMITS.for_session(floats.codec))
    expected = await generate(LocalPipeline([core]), num_tokens=24)
    async with packed.door() as door:
        wire = Wire(door)
        found = await generate(packed.pipeline(wire), num_tokens=24)
    assert len(wire.requests) >= 24
    assert found == expected
    assert len(set(found)) > 2
