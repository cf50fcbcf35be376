"""A GGUF file is a model: what is computed of it is what its packed weights mean."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import ModelError
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.kernels.sealed_memory import SealedMemory, is_sealed
from pipeline.models.config import load_config
from pipeline.models.registry import Beside, load_shard
from pipeline.planning.measured_split import load_of
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model, cut_stage
from pipeline.planning.stage_memory import stage_memory
from pipeline.planning.stage_sizes import stage_sizes
from pipeline.weights import checkpoint, verified_file
from pipeline.weights.checkpoint import hash_files, load_tensors, stored_tensors, weight_files
from pipeline.weights.tensor_sinks import CopySink
from tests.pipeline.gguf_files import Types, write_gguf
from tests.pipeline.oracles import Pipeline, randomise

WEIGHTS = "model.safetensors"
WIDE = {
    "vocab_size": 101, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 96,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=True)),
    "llama-biases": lambda: LlamaForCausalLM(
        LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE | {"head_dim": 64})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE)),
    # as many layers as until the first without a window, which is shorter than the prompt
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **WIDE | {"num_hidden_layers": 6, "intermediate_size": 256},
            query_pre_attn_scalar=96,
            sliding_window=7,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        )
    ),
}


def mixture(name: str) -> Types:
    """As llama.cpp's mixtures: types differ from tensor to tensor."""
    kinds = {
        "attn_q": Types.Q4_K, "attn_k": Types.Q5_0, "attn_v": Types.Q6_K,
        "attn_output": Types.Q5_K, "ffn_gate": Types.Q4_1, "ffn_up": Types.Q5_1,
        "ffn_down": Types.Q4_0, "token_embd": Types.Q8_0, "output": Types.BF16,
    }  # fmt: skip
    return kinds[name.split(".")[-2]]


class Written:
    """A model directory, the same as one GGUF file, and as the floats that this means."""

    def __init__(self, root: Path, model, kind_of=mixture) -> None:
        self.directory = root / "hf"
        randomise(model).save_pretrained(self.directory)
        self.path = root / "model.gguf"
        self.meaning = write_gguf(self.directory, self.path, kind_of)
        self.floats = root / "floats"
        shutil.copytree(self.directory, self.floats)
        save_file(self.meaning, self.floats / "model.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    made = {}

    def get(name: str) -> Written:
        if name not in made:
            torch.manual_seed(0)
            made[name] = Written(tmp_path_factory.mktemp(name), MODELS[name]())
        return made[name]

    return get


def logits(model: Path, dtype: str = "float32", *, kernels: str = "auto") -> torch.Tensor:
    config = load_config(model)
    hashes = hash_files(weight_files(model))
    shard = load_shard(
        model, config, 0, config.num_layers, dtype=dtype, kernels=kernels, expected_hashes=hashes
    )
    ids = torch.arange(3, 26)
    return Pipeline([shard]).greedy(ids, 4)[1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block_bytes", [1 << 12, 2 << 20])
def test_every_tensor_is_its_formats_own_dequantisation(written, monkeypatch, name, block_bytes):
    monkeypatch.setattr(verified_file, "BLOCK_BYTES", block_bytes)
    model = written(name)
    read = {key: np.empty(value.shape, np.float32) for key, value in model.meaning.items()}
    assert stored_tensors(model.path).keys() == read.keys()
    sinks = {key: CopySink(array) for key, array in read.items()}
    load_tensors(model.path, sinks, expected_hashes=hash_files([model.path]))
    for key, array in read.items():
        np.testing.assert_array_equal(array, model.meaning[key], err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_is_that_of_the_model_it_was_made_of(written, name):
    model = written(name)
    own, theirs = load_config(model.path), load_config(model.directory)
    assert own == theirs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_shard_computes_as_one_of_the_unpacked_weights(written, name, dtype):
    model = written(name)
    assert torch.equal(logits(model.path, dtype), logits(model.floats, dtype))


def test_a_shard_computes_so_on_torch(written):
    model = written("llama")
    assert torch.equal(logits(model.path, kernels="torch"), logits(model.floats, kernels="torch"))


def test_stages_of_one_file_pin_and_read_it_whole(written):
    model = written("llama-tied")
    manifest = plan(model.path, PlanOptions(2))
    digest = hashlib.sha256(model.path.read_bytes()).hexdigest()
    assert [stage.weight_hashes for stage in manifest.stages] == [(digest,)] * 2
    config = load_config(model.path, manifest.config_hash)
    shards = [
        load_shard(
            model.path, config, stage.layer_start, stage.layer_end,
            expected_hashes=stage.weight_hashes,
        )
        for stage in manifest.stages
    ]  # fmt: skip
    assert torch.equal(Pipeline(shards).greedy(torch.arange(3, 26), 4)[1], logits(model.floats))


@pytest.mark.skipif(
    not hasattr(os, "memfd_create") or why_not_native() is not None,
    reason="needs memory that can be sealed, and native kernels",
)
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_stages_of_one_file_that_is_read_once_for_both_compute_the_same(written, dtype):
    model = written("llama-tied")
    first, second = plan(model.path, PlanOptions(2)).stages
    fds = [os.memfd_create("weights", os.MFD_ALLOW_SEALING) for _ in range(2)]
    rest = range(second.layer_start, second.layer_end)

    def load(layers, fd, beside=()):
        return load_shard(
            model.path, load_config(model.path), layers.start, layers.stop, dtype=dtype,
            kernels="native", expected_hashes=first.weight_hashes, memory=SealedMemory(fd),
            beside=beside,
        )  # fmt: skip

    beside = Beside(rest, SealedMemory(fds[1]))
    shards = [load(range(first.layer_start, first.layer_end), fds[0], [beside])]
    assert all(map(is_sealed, fds))
    shards.append(load(rest, fds[1]))
    found = Pipeline(shards).greedy(torch.arange(3, 26), 4)[1]
    assert torch.equal(found, logits(model.path, dtype, kernels="native"))
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("at", [10, 200, -1])
def test_any_changed_byte_fails_the_hash(written, tmp_path, at):
    model = written("llama-tied")
    hashes = hash_files([model.path])
    raw = bytearray(model.path.read_bytes())
    raw[len(raw) // 2 if at == 200 else at] ^= 1
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelError):
        load_shard(path, load_config(model.path), 0, 2, expected_hashes=hashes)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_a_cut_model_keeps_its_weights_packed(written, tmp_path, name):
    model = written(name)
    manifest = plan(model.path, PlanOptions(2))
    pinned = cut_model(manifest, model.path, tmp_path / "cut")
    parts = [tmp_path / "cut" / f"stage{index}" for index in range(2)]
    stored = load_file(parts[0] / "model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.weight.Q4_K"].shape == (
        WIDE["num_attention_heads"] * load_config(model.path).head_dim, 144,
    )  # fmt: skip
    size = sum((part / "model.safetensors").stat().st_size for part in parts)
    assert size < 1.3 * model.path.stat().st_size  # a tied embedding is in both
    shards = [
        load_shard(
            part, load_config(part, pinned.config_hash), stage.layer_start, stage.layer_end,
            expected_hashes=stage.weight_hashes,
        )
        for part, stage in zip(parts, pinned.stages, strict=True)
    ]  # fmt: skip
    assert torch.equal(Pipeline(shards).greedy(torch.arange(3, 26), 4)[1], logits(model.floats))
    cut_stage(pinned, 1, model.path, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        parts[1] / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_a_model_cut_in_a_precision_holds_what_its_stages_compute_with(
    written, tmp_path, precision
):
    model = written("llama")
    manifests = [plan(path, PlanOptions(1)) for path in (model.path, model.floats)]
    for manifest, path in zip(manifests, (model.path, model.floats), strict=True):
        cut_model(manifest, path, tmp_path / path.name, precision)
    parts = [tmp_path / path.name / "stage0" for path in (model.path, model.floats)]
    cut = [load_torch_file(part / "model.safetensors") for part in parts]
    assert cut[0].keys() == cut[1].keys()
    weight = cut[0]["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == (torch.int8 if precision == "int8" else torch.bfloat16)
    assert torch.equal(*(logits(part, precision) for part in parts))


def test_a_model_cut_in_int4_computes_as_its_file_does_in_int4(written, tmp_path):
    model = written("llama")
    cut_model(plan(model.path, PlanOptions(1)), model.path, tmp_path / "cut", "int4")
    part = tmp_path / "cut" / "stage0"
    kept = {name.removeprefix("model.layers.0.") for name in load_torch_file(part / WEIGHTS)}
    assert kept >= {"mlp.down_proj.int4", "mlp.down_proj.int4_zero"}
    # of more bits, or one matrix in memory with such as are
    eight = {"self_attn.v_proj", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"}
    assert kept >= {f"{name}.weight{part}" for name in eight for part in ("", "_scale")}
    assert torch.equal(logits(part, "int4"), logits(model.path, "int4"))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_weights_of_more_bits_lose_no_more_in_int4_than_in_int8(written, kernels):
    model = written("qwen3")
    exact = logits(model.path, kernels=kernels)
    int8, int4 = (
        (logits(model.path, each, kernels=kernels) - exact).abs().mean()
        for each in ("int8", "int4")
    )
    # Q4_0, of which down projections are, is int4's own: the rest is in eight bits
    assert int4 <= 1.5 * int8


def test_what_a_stage_takes_in_int4_is_counted_by_how_its_weights_come(written):
    model = written("llama")
    manifest = plan(model.path, PlanOptions(2, precision="int4"))
    for stage, told in zip(
        manifest.stages, stage_memory(manifest, model.path, "float32", {}), strict=True
    ):
        shard = load_shard(
            model.path, load_config(model.path), stage.layer_start, stage.layer_end,
            dtype="int4", kernels="native", expected_hashes=None,
        )  # fmt: skip
        sizes = stage_sizes(manifest, stage.stage_idx, model.path, 1, 64)
        assert told.weight_bytes == sizes.weights
        assert sizes.weights == pytest.approx(shard.num_weight_bytes, rel=0.02)


def test_what_a_model_takes_is_counted_by_its_packed_bytes(written):
    model = written("llama")
    packed, floats = (load_of(path, "int8") for path in (model.path, model.floats))
    for own, other in zip(packed.layer_bytes, floats.layer_bytes, strict=True):
        assert own == pytest.approx(other, rel=0.5)
    assert sum(checkpoint.tensor_sizes(model.path).values()) < model.path.stat().st_size


def test_weights_of_other_shapes_than_the_configuration_means_are_refused(written, tmp_path):
    model = written("llama")
    fields = json.loads((model.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"intermediate_size": 768}))
    with pytest.raises(ModelError, match=r"has shape .*512.*, config.json means .*768"):
        load_shard(model.path, load_config(tmp_path), 0, 2, expected_hashes=None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Types.Q8_0, Types.F16])
def test_smollm2_as_one_file_says_what_its_unpacked_weights_say(smollm2_dir, tmp_path, kind):
    path, floats = tmp_path / "model.gguf", tmp_path / "floats"
    meaning = write_gguf(smollm2_dir, path, lambda _: kind, tokenizer=True)
    shutil.copytree(smollm2_dir, floats)
    save_file(meaning, floats / "model.safetensors")
    ids = Tokenizer(path / "tokenizer.json").encode("The capital of France is")
    assert ids == Tokenizer(smollm2_dir / "tokenizer.json").encode("The capital of France is")
    found = []
    for model in (path, floats):
        config = load_config(model)
        shard = load_shard(model, config, 0, config.num_layers, expected_hashes=None)
        found.append(Pipeline([shard]).greedy(torch.tensor(ids), 16))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
