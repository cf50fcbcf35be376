import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.agreement.manifest import load_manifest
from pipeline.errors import InputError, ManifestError, ModelError
from pipeline.models.config import load_config
from pipeline.models.ends import NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model, cut_stage
from pipeline.protocol.batch import Segment


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def test_shards_hold_their_stages_tensors_alone_and_unchanged(model_dir, tmp_path):
    pinned = cut_model(plan(model_dir, PlanOptions(2)), model_dir, tmp_path / "out")
    whole = load_file(model_dir / "model.safetensors")
    seen = set()
    for stage in pinned.stages:
        shard = load_file(tmp_path / "out" / f"stage{stage.stage_idx}" / "model.safetensors")
        assert all(torch.equal(tensor, whole[name]) for name, tensor in shard.items())
        seen |= shard.keys()
    assert seen == whole.keys()
    assert load_manifest(tmp_path / "out" / "manifest.json") == pinned


def test_a_shard_serves_its_stage_and_no_other(model_dir, tmp_path):
    pinned = cut_model(plan(model_dir, PlanOptions(2)), model_dir, tmp_path / "out")
    stage = pinned.stage(1)
    directory = tmp_path / "out" / "stage1"
    config = load_config(directory, pinned.config_hash)
    load_shard(directory, config, stage.layer_start, stage.layer_end,
               expected_hashes=stage.weight_hashes)  # fmt: skip
    with pytest.raises(ModelError):
        load_shard(directory, config, 0, stage.layer_start, expected_hashes=None)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_a_shard_in_its_precision_computes_as_one_converted_at_load(model_dir, tmp_path, precision):
    manifest = plan(model_dir, PlanOptions(2))
    pinned = cut_model(manifest, model_dir, tmp_path / "out", precision)
    rows = np.arange(5)
    caches = []
    for stage in pinned.stages:
        assert stage.precision == precision
        found = []
        for directory in (model_dir, tmp_path / "out" / f"stage{stage.stage_idx}"):
            shard = load_shard(
                directory, load_config(directory), stage.layer_start, stage.layer_end,
                dtype=precision,
                expected_hashes=None if directory == model_dir else stage.weight_hashes,
            )  # fmt: skip
            caches.append(shard.new_cache(1, 16))
            hidden = shard.forward(rows, [Segment(0, 0, 5)], caches[-1])
            found += shard.kernels.to_host(hidden)
        np.testing.assert_array_equal(*found)
        rows = found[0]


def tiny_gpt2_with_its_own_head():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tiny_experts():
    from tests.pipeline.models.family_models import make_model

    return make_model("qwen3_moe-0")


@pytest.mark.parametrize("make", [tiny_gpt2_with_its_own_head, tiny_experts])
def test_an_int8_shard_loads_and_computes_as_one_converted_at_load(tmp_path, make):
    """Of a head without a prefix in the file, as its scales; of a router that stays exact."""
    source = tmp_path / "model"
    make().save_pretrained(source)
    cut_model(plan(source, PlanOptions(1)), source, tmp_path / "out", "int8")
    logits = []
    for directory in (source, tmp_path / "out" / "stage0"):
        shard = load_shard(
            directory, config := load_config(directory), 0, config.num_layers, dtype="int8",
            expected_hashes=None,
        )  # fmt: skip
        hidden = shard.forward(np.arange(5), [Segment(0, 0, 5)], shard.new_cache(1, 16))
        logits += shard.kernels.to_host(shard.logits(hidden))
    np.testing.assert_array_equal(*logits)


def test_an_int8_shard_holds_its_matrices_in_int8_with_their_scales(model_dir, tmp_path):
    pinned = cut_model(plan(model_dir, PlanOptions(1)), model_dir, tmp_path / "out", "int8")
    path = tmp_path / "out" / "stage0" / "model.safetensors"
    tensors = load_file(path)
    matrices = {name for name, tensor in tensors.items() if tensor.dtype is torch.int8}
    assert all(f"{name}_scale" in tensors for name in matrices)
    kept = [each for each in tensors if each not in matrices and not each.endswith("_scale")]
    assert kept
    assert all(tensors[name].dim() == 1 for name in kept)  # norms
    with pytest.raises(ModelError, match="stored as I8"):
        cut_model(pinned, path.parent, tmp_path / "again", "int8")


def test_an_int4_shard_holds_layers_in_four_bits_and_its_ends_in_eight(model_dir, tmp_path):
    cut_model(plan(model_dir, PlanOptions(1)), model_dir, tmp_path / "out", "int4")
    part = tmp_path / "out" / "stage0"
    tensors = load_file(part / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dim() == 2}
    assert kinds.pop("model.embed_tokens.weight") is torch.int8
    layers = {name.rpartition(".")[2] for name in kinds if name.startswith("model.layers.")}
    assert layers == {"int4", "int4_scale", "int4_zero"}
    # whoever computes in something else is given what these mean
    config = load_config(part)
    found = [
        load_shard(part, config, 1, 1 + 1, dtype=dtype, ends=NO_ENDS, expected_hashes=None)
        for dtype in ("int4", "float32")
    ]
    rows = np.random.default_rng(0).standard_normal((5, config.hidden_dim), np.float32)
    batch = [Segment(0, 0, 5)]
    held = [
        shard.kernels.to_host(shard.forward(rows, batch, shard.new_cache(1, 16)))[0].copy()
        for shard in found
    ]
    assert np.abs(held[0] - held[1]).max() <= 0.02 * np.abs(held[1]).max()


def test_a_matrix_of_an_odd_number_of_inputs_stays_in_floats_and_means_the_same(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=49, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    source = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(source)
    cut_model(plan(source, PlanOptions(1)), source, tmp_path / "out", "int4")
    part = tmp_path / "out" / "stage0"
    assert "model.layers.0.mlp.down_proj.weight" in load_file(part / "model.safetensors")
    found = []
    for directory in (source, part):
        shard = load_shard(
            directory, load_config(directory), 0, 1, dtype="int4", expected_hashes=None
        )
        hidden = shard.forward(np.arange(5), [Segment(0, 0, 5)], shard.new_cache(1, 16))
        found += shard.kernels.to_host(hidden)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("int4", lambda each: each[:, :-1].contiguous(), "has int4_scale of shape|has shape"),
        ("int4", lambda each: each.to(torch.int8), "is I8 .*no bytes of two inputs"),
        ("int4_scale", lambda each: each.float(), "has int4_scale of F32"),
        ("int4_zero", lambda each: each[:-1].contiguous(), "has int4_zero of shape"),
    ],
)
def test_int4_whose_parts_do_not_fit_is_refused_by_name(model_dir, tmp_path, part, change, why):
    cut_model(plan(model_dir, PlanOptions(1)), model_dir, tmp_path / "out", "int4")
    directory = tmp_path / "out" / "stage0"
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.1.mlp.up_proj.{part}"
    tensors[name] = change(tensors[name])
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"layers.1.mlp.up_proj.weight ({why})"):
        load_shard(directory, load_config(directory), 0, 3, dtype="int4", expected_hashes=None)


def test_a_manifests_own_precision_is_what_its_shards_are_stored_in(model_dir, tmp_path):
    manifest = plan(model_dir, PlanOptions(2, precision="int8"))
    pinned = cut_model(manifest, model_dir, tmp_path / "out")
    assert [stage.precision for stage in pinned.stages] == ["int8", "int8"]
    shard = load_file(tmp_path / "out" / "stage1" / "model.safetensors")
    assert shard["model.norm.weight"].dtype is torch.bfloat16
    assert any(tensor.dtype is torch.int8 for tensor in shard.values())


def test_a_shard_is_the_file_that_the_safetensors_library_writes(model_dir, tmp_path):
    for precision in ("float32", "bfloat16", "int8", "int4"):
        out = tmp_path / precision
        cut_model(plan(model_dir, PlanOptions(2)), model_dir, out, precision)
        path = out / "stage0" / "model.safetensors"
        save_file(load_file(path), tmp_path / "again", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_a_stages_directory_carries_the_core_and_what_an_enclave_runs(model_dir, tmp_path):
    pinned = cut_model(plan(model_dir, PlanOptions(2)), model_dir, tmp_path / "out")
    for stage in (0, 1):
        directory = tmp_path / "out" / f"stage{stage}"
        core = load_manifest(directory / "manifest.json")
        assert core.core_hash() == pinned.core_hash()
        assert core.stage(stage).endpoint is None
        argv = json.loads((directory / "run.json").read_text())["argv"]
        assert argv[argv.index("--stage-idx") + 1] == str(stage)
        assert "--dev" not in argv


def test_one_stage_is_cut_again_to_the_same_bytes(model_dir, tmp_path):
    pinned = cut_model(plan(model_dir, PlanOptions(2)), model_dir, tmp_path / "out")
    cut_stage(pinned, 1, model_dir, tmp_path / "again")
    for path in (tmp_path / "out" / "stage1").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_manifest_that_pins_no_shards_is_refused_for_one_stage(model_dir, tmp_path):
    with pytest.raises(ManifestError, match="without --stage"):
        cut_stage(plan(model_dir, PlanOptions(2)), 0, model_dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_the_manifests_leaves_nothing_behind(model_dir, tmp_path):
    manifest = plan(model_dir, PlanOptions(2))
    stages = tuple(s.model_copy(update={"weight_hashes": ("0" * 64,)}) for s in manifest.stages)
    with pytest.raises(ModelError, match="0" * 64):
        cut_model(manifest.model_copy(update={"stages": stages}), model_dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_is_not_overwritten(model_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not an empty directory"):
        cut_model(plan(model_dir, PlanOptions(2)), model_dir, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_weights_of_a_kind_that_cannot_be_served_are_named(model_dir, tmp_path):
    odd = tmp_path / "model"
    shutil.copytree(model_dir, odd)
    tensors = load_file(odd / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    save_file({**tensors, name: tensors[name].to(torch.int64)}, odd / "model.safetensors")
    with pytest.raises(ModelError, match=f"{name} is stored as I64"):
        cut_model(plan(odd, PlanOptions(2)), odd, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [odd]


def test_the_directory_of_shards_stands_for_the_model(model_dir, tmp_path):
    source = shutil.copytree(model_dir, tmp_path / "source")
    texts = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}"}
    for name, text in texts.items():
        (source / name).write_text(text)
    out = tmp_path / "out"
    pinned = cut_model(plan(source, PlanOptions(2)), source, out)
    assert {name: (out / name).read_text() for name in texts} == texts
    assert load_config(out, pinned.config_hash) == load_config(source)
    assert not any((out / "stage0" / name).exists() for name in texts)  # is measured
