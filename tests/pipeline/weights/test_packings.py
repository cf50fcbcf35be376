"""Weights that other programs packed mean what their formats say, one number at a time."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from pipeline.weights.checkpoint import hash_files, load_tensors, weight_files
from pipeline.weights.int4 import dequantise_int4
from pipeline.weights.tensor_sinks import CopySink, WeightSink
from tests.pipeline.oracles import Pipeline, randomise

SHAPE = {
    "vocab_size": 101, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUP = 32


def packed_rows(numbers: np.ndarray, bits: int = 4, order=None) -> torch.Tensor:
    """[n, m] -> int32 [n, m * bits / 32], the first of `order` in the lowest bits."""
    per = 32 // bits
    each = numbers.reshape(len(numbers), -1, per)[:, :, list(order or range(per))]
    words = sum(each[:, :, place] << bits * place for place in range(per))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


class Maker:
    """Random packed tensors of a weight [out, in], and the numbers they mean."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def scales(self, *shape: int) -> np.ndarray:
        return self.random.uniform(0.01, 0.03, shape).astype(np.float16)

    def numbers(self, *shape: int, most: int = 16) -> np.ndarray:
        return self.random.integers(0, most, shape)


def awq(maker: Maker, num_out: int, num_in: int) -> tuple[dict, np.ndarray]:
    groups = num_in // GROUP
    q, z = maker.numbers(num_in, num_out), maker.numbers(groups, num_out)
    s = maker.scales(groups, num_out)
    of = np.arange(num_in) // GROUP
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        "qweight": packed_rows(q, order=order),
        "qzeros": packed_rows(z, order=order),
        "scales": torch.from_numpy(s),
    }
    return parts, ((q - z[of]) * s[of].astype(np.float32)).T


def gptq(*, version=1, bits=4, symmetric=False, act_order=False, mislabelled=False):
    def make(maker: Maker, num_out: int, num_in: int) -> tuple[dict, np.ndarray]:
        groups, most = num_in // GROUP, 1 << bits
        q = maker.numbers(num_in, num_out, most=most)
        z = np.full((groups, num_out), most // 2)
        z = z if symmetric else maker.numbers(groups, num_out, most=most)
        s = maker.scales(groups, num_out)
        of = np.arange(num_in) // GROUP
        of = maker.random.permutation(of) if act_order else of
        less = 0 if version == 2 or mislabelled else 1
        parts = {
            "qweight": packed_rows(q.T, bits).T.contiguous(),
            "qzeros": packed_rows((z - less) % most, bits),
            "scales": torch.from_numpy(s),
            "g_idx": torch.from_numpy(of.astype(np.int32)),
        }
        return parts, ((q - z[of]) * s[of].astype(np.float32)).T

    return make


def packed_words(*, zeros=False, act_order=False, bits=4, channel=False):
    def make(maker: Maker, num_out: int, num_in: int) -> tuple[dict, np.ndarray]:
        groups, most = 1 if channel else num_in // GROUP, 1 << bits
        q = maker.numbers(num_out, num_in, most=most)
        z = np.full((num_out, groups), most // 2)
        s = maker.scales(num_out, groups)
        of = np.arange(num_in) // (num_in // groups)
        of = maker.random.permutation(of) if act_order else of
        parts = {
            "weight_packed": packed_rows(q, bits),
            "weight_scale": torch.from_numpy(s).to(torch.bfloat16),
            "weight_shape": torch.tensor([num_out, num_in]),
        }
        if zeros:
            z = maker.numbers(num_out, groups, most=most)
            parts["weight_zero_point"] = packed_rows(z.T, bits).T.contiguous()
        if act_order:
            parts["weight_g_idx"] = torch.from_numpy(of.astype(np.int32))
        scale = parts["weight_scale"].float().numpy()
        return parts, (q - z[:, of]) * scale[:, of]

    return make


def whole_bytes(*shape_of_scale: int):
    def make(maker: Maker, num_out: int, num_in: int) -> tuple[dict, np.ndarray]:
        q = maker.numbers(num_out, num_in, most=255) - 127
        s = maker.scales(*(num_out if each == -1 else each for each in shape_of_scale))
        parts = {
            "weight": torch.from_numpy(q.astype(np.int8)),
            "weight_scale": torch.from_numpy(s),
        }
        every = np.repeat(np.float32(s), num_in // s.shape[-1], axis=-1) if s.ndim == 2 else s
        return parts, q * every.astype(np.float32)

    return make


def compressed(form: str, **weights) -> dict:
    group = {"weights": {"type": "int", "symmetric": True, **weights}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
W4 = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
KINDS = {
    "awq": (AWQ, awq),
    "gptq": (GPTQ, gptq()),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(version=2)),
    "gptq act-order": (GPTQ | {"desc_act": True}, gptq(act_order=True)),
    "gptq symmetric": (GPTQ | {"sym": True}, gptq(symmetric=True)),
    "gptq symmetric mislabelled": (
        GPTQ | {"sym": True}, gptq(symmetric=True, mislabelled=True),
    ),
    "gptq of 8 bits": (GPTQ | {"bits": 8}, gptq(bits=8)),
    "w4a16": (compressed("pack-quantized", **W4), packed_words()),
    "w4a16 with zeros": (
        compressed("pack-quantized", **W4 | {"symmetric": False}), packed_words(zeros=True),
    ),
    "w4a16 act-order": (compressed("pack-quantized", **W4), packed_words(act_order=True)),
    "w4a16 of channels": (
        compressed("pack-quantized", num_bits=4, strategy="channel"), packed_words(channel=True),
    ),
    "w8a16": (compressed("pack-quantized", **W4 | {"num_bits": 8}), packed_words(bits=8)),
    "w8a8 of channels": (
        compressed("int-quantized", num_bits=8, strategy="channel"), whole_bytes(-1, 1),
    ),
    "w8a8 of tensors": (
        compressed("int-quantized", num_bits=8, strategy="tensor"), whole_bytes(1),
    ),
    "w8a8 of groups": (
        compressed("int-quantized", num_bits=8, strategy="group", group_size=32),
        whole_bytes(-1, 4),
    ),
}  # fmt: skip


class Packed:
    """A tiny Llama whose layers' matrices are packed, and the same in floats."""

    def __init__(self, root: Path, kind: str, **fields) -> None:
        config, make = KINDS[kind]
        torch.manual_seed(0)
        self.directory, self.floats = root / "packed", root / "floats"
        model = randomise(LlamaForCausalLM(LlamaConfig(**SHAPE | fields)))
        for directory in (self.directory, self.floats):
            model.save_pretrained(directory)
        tensors = load_file(self.floats / "model.safetensors")
        packed, self.meaning = dict(tensors), {}
        for seed, name in enumerate(sorted(tensors)):
            if not name.endswith("_proj.weight"):
                continue
            stem = name.removesuffix(".weight")
            parts, values = make(Maker(seed), *tensors[name].shape)
            del packed[name]
            packed |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
            self.meaning[name] = np.ascontiguousarray(values, np.float32)
        save_file(packed, self.directory / "model.safetensors")
        meaning = {name: torch.from_numpy(each) for name, each in self.meaning.items()}
        save_file(tensors | meaning, self.floats / "model.safetensors")
        self.change(quantization_config=config)

    def change(self, **fields) -> None:
        path = self.directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def rewrite(self, change) -> None:
        tensors = load_file(self.directory / "model.safetensors")
        change(tensors)
        save_file(tensors, self.directory / "model.safetensors")


@pytest.fixture
def packed(tmp_path):
    return lambda kind: Packed(tmp_path, kind)


def logits(model: Path, dtype: str = "float32") -> torch.Tensor:
    config = load_config(model)
    shard = load_shard(
        model, config, 0, config.num_layers, dtype=dtype,
        expected_hashes=hash_files(weight_files(model)),
    )  # fmt: skip
    return Pipeline([shard]).greedy(torch.arange(3, 26), 4)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_mean_what_their_format_says(packed, kind):
    model = packed(kind)
    read = {name: np.empty(each.shape, np.float32) for name, each in model.meaning.items()}
    load_tensors(
        model.directory,
        {name: CopySink(array) for name, array in read.items()},
        expected_hashes=None,
        packing=load_config(model.directory).packing,
    )
    for name, array in read.items():
        np.testing.assert_allclose(array, model.meaning[name], rtol=1e-6, err_msg=name)
    assert torch.equal(logits(model.directory, "int8"), logits(model.floats, "int8"))


class Int4Store:
    """Notes what a matrix is given in four bits, and whether it was given anything else."""

    precision = "int4"

    def __init__(self, num_out: int, num_in: int) -> None:
        self.held = np.full((num_out, num_in), np.nan, np.float32)
        self.is_exact = True

    def put(self, first, outputs, scales, *, first_in=0):
        self.is_exact = False

    def put_int4(self, first, weights, *, first_in=0):
        rows = slice(first, first + len(weights.levels))
        self.held[rows, first_in : first_in + weights.num_in] = dequantise_int4(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_whose_groups_fit_stay_what_they_are(packed, kind):
    model = packed(kind)
    stores = {name: Int4Store(*each.shape) for name, each in model.meaning.items()}
    sinks = {
        name: WeightSink(store, 0, *store.held.shape, is_in_out=False)
        for name, store in stores.items()
    }
    fits = not kind.startswith("w8") and "act-order" not in kind and "8 bits" not in kind
    packing = load_config(model.directory).packing
    # whoever plans for what comes in more bits has eight for it
    another = pytest.raises(ModelError, match="changed while it was read")
    with nullcontext() if fits else another:
        load_tensors(model.directory, sinks, expected_hashes=None, packing=packing)
    for name, store in stores.items():
        assert store.is_exact == fits
        if fits:
            np.testing.assert_array_equal(store.held, model.meaning[name], err_msg=name)


@pytest.mark.parametrize("kind", ["gptq act-order", "w4a16 act-order", "w8a16"])
def test_what_does_not_fit_int4_is_held_in_int8(packed, kind):
    model = packed(kind)
    assert torch.equal(logits(model.directory, "int4"), logits(model.directory, "int8"))


@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq act-order", "w4a16 with zeros"])
def test_a_packed_model_is_cut_in_int4(packed, tmp_path, kind):
    model = packed(kind)
    cut_model(plan(model.directory, PlanOptions(1)), model.directory, tmp_path / "cut", "int4")
    part = tmp_path / "cut" / "stage0"
    assert "quantization_config" not in json.loads((part / "config.json").read_text())
    assert torch.equal(logits(part, "int4"), logits(model.directory, "int4"))


@pytest.mark.parametrize("kind", ["awq", "gptq act-order", "w4a16 with zeros", "w8a8 of channels"])
def test_a_cut_model_keeps_its_weights_packed(packed, tmp_path, kind):
    model = packed(kind)
    pinned = cut_model(plan(model.directory, PlanOptions(2)), model.directory, tmp_path / "cut")
    parts = [tmp_path / "cut" / f"stage{index}" for index in range(2)]
    whole = load_file(model.directory / "model.safetensors")
    for name, tensor in load_file(parts[1] / "model.safetensors").items():
        assert torch.equal(tensor, whole[name])
    shards = [
        load_shard(
            part, load_config(part, pinned.config_hash), stage.layer_start, stage.layer_end,
            expected_hashes=stage.weight_hashes,
        )
        for part, stage in zip(parts, pinned.stages, strict=True)
    ]  # fmt: skip
    assert torch.equal(Pipeline(shards).greedy(torch.arange(3, 26), 4)[1], logits(model.floats))


@pytest.mark.parametrize("kind", ["awq", "gptq", "w4a16", "w8a8 of channels"])
def test_a_packed_model_is_cut_in_int8(packed, tmp_path, kind):
    model = packed(kind)
    for path in (model.directory, model.floats):
        cut_model(plan(path, PlanOptions(1)), path, tmp_path / "cut" / path.name, "int8")
    parts = [tmp_path / "cut" / name / "stage0" for name in ("packed", "floats")]
    assert torch.equal(*(logits(part, "int8") for part in parts))
    own = [load_file(part / "model.safetensors") for part in parts]
    assert own[0].keys() == own[1].keys()
    assert all(torch.equal(tensor, own[1][name]) for name, tensor in own[0].items())
