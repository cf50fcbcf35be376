"""Experts in MXFP4 mean what the format says, stay packed in shards, and misfits are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard, outline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from pipeline.weights.checkpoint import load_tensors
from pipeline.weights.tensor_sinks import CopySink
from tests.pipeline.oracles import Pipeline, randomise
from tests.pipeline.weights.test_packings import logits

# Rows and columns that end amid blocks, and groups of 32 of which 64 do not divide a row.
SHAPE = {
    "vocab_size": 101, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
    "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
STACKS = ("gate_up_proj", "down_proj")
NAME = "model.layers.1.mlp.experts.down_proj"


class Packed:
    """A tiny gpt-oss whose experts are packed, and the same in floats."""

    def __init__(self, root):
        self.directory, self.floats = root / "packed", root / "floats"
        model = randomise(GptOssForCausalLM(GptOssConfig(**SHAPE)))
        for directory in (self.directory, self.floats):
            model.save_pretrained(directory)
        tensors = load_file(self.floats / "model.safetensors")
        packed, self.meaning, random = dict(tensors), {}, np.random.default_rng(0)
        for name in [name for name in tensors if name.endswith(STACKS)]:
            count, num_in, num_out = packed.pop(name).shape
            shape = count, num_out, num_in // 32
            blocks, scales = random.integers(0, 256, (*shape, 16)), random.integers(120, 126, shape)
            parts = [torch.from_numpy(each.astype(np.uint8)) for each in (blocks, scales)]
            packed |= {f"{name}_blocks": parts[0], f"{name}_scales": parts[1]}
            self.meaning[name] = convert_moe_packed_tensors(*parts, dtype=torch.float32)
        save_file(packed, self.directory / "model.safetensors")
        save_file(tensors | self.meaning, self.floats / "model.safetensors")
        path = self.directory / "config.json"
        fields = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
        path.write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return Packed(tmp_path_factory.mktemp("mxfp4"))


def read(model, names=None):
    """The stacks as [n, out, in]."""
    names = names or list(model.meaning)
    found = {name: np.empty(model.meaning[name].mT.shape, np.float32) for name in names}
    load_tensors(
        model.directory,
        {name: CopySink(array) for name, array in found.items()},
        expected_hashes=None,
        packing=load_config(model.directory).packing,
    )
    return found


def test_stacks_of_blocks_mean_what_transformers_makes_of_them(model):
    for name, array in read(model).items():
        assert (array == model.meaning[name].mT.numpy()).all()


def test_numbers_are_those_of_the_format(model):
    """One by one: a sign, two bits of exponent, one of mantissa; and a power of two for 32."""
    tensors = load_file(model.directory / "model.safetensors")
    blocks, scales = (tensors[f"{NAME}_{part}"].numpy() for part in ("blocks", "scales"))
    (array,) = read(model, [NAME]).values()
    for expert, output, at in ((0, 0, 0), (1, 5, 33), (2, 95, 159), (2, 7, 64), (1, 90, 31)):
        byte = int(blocks[expert, output, at // 32, at % 32 // 2])
        code = byte >> 4 if at % 2 else byte & 15
        exponent, mantissa = code >> 1 & 3, code & 1
        number = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        number *= -1 if code & 8 else 1
        expected = number * 2.0 ** (int(scales[expert, output, at // 32]) - 127)
        assert array[expert, output, at] == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_packed_experts_compute_what_their_floats_do(model, dtype):
    assert torch.equal(logits(model.directory, dtype), logits(model.floats, dtype))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_shards_hold_experts_packed_whatever_the_rest_is_in(model, tmp_path, dtype):
    planned = plan(model.directory, PlanOptions(2))
    pinned = cut_model(planned, model.directory, tmp_path / "cut", dtype)
    parts = [tmp_path / "cut" / f"stage{index}" for index in range(2)]
    whole = load_file(model.directory / "model.safetensors")
    held = load_file(parts[1] / "model.safetensors")
    for part in ("blocks", "scales"):
        assert torch.equal(held[f"{NAME}_{part}"], whole[f"{NAME}_{part}"])
    assert ("lm_head.weight_scale" in held) == (dtype == "int8")
    shards = [
        load_shard(
            part, load_config(part, pinned.config_hash), stage.layer_start, stage.layer_end,
            dtype=dtype or "float32", expected_hashes=stage.weight_hashes,
        )
        for part, stage in zip(parts, pinned.stages, strict=True)
    ]  # fmt: skip
    found = Pipeline(shards).greedy(torch.arange(3, 26), 4)[1]
    assert torch.equal(found, logits(model.floats, dtype or "float32"))


def test_floats_of_experts_are_cut_as_floats(model, tmp_path):
    pinned = cut_model(plan(model.floats, PlanOptions(1)), model.floats, tmp_path / "cut")
    part, (stage,) = tmp_path / "cut" / "stage0", pinned.stages
    config = load_config(part, pinned.config_hash)
    shard = load_shard(part, config, 0, 2, expected_hashes=stage.weight_hashes)
    found = Pipeline([shard]).greedy(torch.arange(3, 26), 4)[1]
    assert torch.equal(found, logits(model.floats))


def test_a_stage_is_as_large_as_was_reckoned(model):
    config = load_config(model.directory)
    loaded = load_shard(model.directory, config, 0, 2, kernels="torch", expected_hashes=None)
    assert outline(config, range(2), "float32").num_weight_bytes == loaded.num_weight_bytes


def rewritten(model, directory, change):
    tensors = load_file(model.directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_bytes((model.directory / "config.json").read_bytes())
    return directory


def replaced(part, make):
    name = f"{NAME}_{part}"
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


MISFITS = {
    "scales of fewer outputs": (
        replaced("scales", lambda each: each[:, :-1]), "has scales U8 .*its blocks mean",
    ),
    "blocks of other sizes": (replaced("blocks", lambda each: each[..., :8]), "no stack of MXFP4"),
    "blocks of one matrix": (replaced("blocks", lambda each: each[0]), "no stack of MXFP4"),
    "scales that are floats": (replaced("scales", lambda each: each.float()), "has scales F32"),
    "a scale that is none": (replaced("scales", lambda each: each | 255), "are no numbers"),
    "fewer experts": (
        lambda tensors: tensors.update(
            {f"{NAME}_{part}": tensors[f"{NAME}_{part}"][:2].contiguous()
             for part in ("blocks", "scales")}
        ),
        "config.json means",
    ),
    "no scales": (lambda tensors: tensors.pop(f"{NAME}_scales"), "down_proj is missing"),
    "no biases": (lambda tensors: tensors.pop(f"{NAME}_bias"), "down_proj_bias is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit_are_refused_in_one_line(model, tmp_path, name):
    change, message = MISFITS[name]
    with pytest.raises(ModelError, match=message) as caught:
        logits(rewritten(model, tmp_path, change))
    assert NAME in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_rewritten_between_two_reads_are_found_out(model, monkeypatch):
    from pipeline.weights import unpacking

    read_side = unpacking._read
    monkeypatch.setattr(unpacking, "_read", lambda path, stored: read_side(path, stored) ^ 1)
    with pytest.raises(ModelError, match="changed while it was read"):
        logits(model.directory)
