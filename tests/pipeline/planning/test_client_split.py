"""Cutting a model whose ends stay at home: who gets which tensors, in either layout."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.agreement.manifest import load_manifest, parse_manifest
from pipeline.errors import InputError, ModelError
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.families import FAMILIES
from pipeline.models.older_client_part import CLIENT_FILE, client_weights
from pipeline.models.registry import load_shard, required_tensors
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model, cut_stage
from pipeline.protocol.batch import Segment
from pipeline.weights.checkpoint import stored_tensors
from tests.pipeline.oracles import make_oracle  # noqa: F401 - a fixture

ENDS = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight",
             "transformer.ln_f.bias"},
    "llama-untied-gqa": {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"},
    "llama-tied-llama3-rope": {"model.embed_tokens.weight", "model.norm.weight"},
}  # fmt: skip
OLDER = {
    "gpt2": {"embed_tokens.weight", "lm_head.weight", "norm.weight", "norm.bias", "wpe.weight"},
    "llama-untied-gqa": {"embed_tokens.weight", "lm_head.weight", "norm.weight"},
    "llama-tied-llama3-rope": {"embed_tokens.weight", "lm_head.weight", "norm.weight"},
}


@pytest.fixture(params=ENDS)
def oracle(request, make_oracle):  # noqa: F811
    return make_oracle(request.param)


@pytest.fixture
def family(request):
    return request.node.callspec.params["oracle"]


def planned(oracle, **options):
    return plan(oracle.directory, PlanOptions(2, split="client", **options))


def tensors_of(directory):
    (path,) = directory.glob("*.safetensors")
    return load_file(path)


def load_client(oracle, path, hashes, dtype="float32"):
    return load_shard(
        client_weights(path), oracle.config, 0, 0, ends=BOTH_ENDS, dtype=dtype,
        expected_hashes=hashes,
    )  # fmt: skip


def computed(shard):
    """What ends make of ids at their places, and of rows."""
    ids, rows = np.arange(5, 9), np.random.default_rng(2).standard_normal((3, 64), np.float32)
    hidden = shard.embed(ids, (Segment(1, 7, 4),))
    return [*shard.kernels.to_host(hidden, shard.logits(shard.kernels.to_device(rows)))]


def test_servers_get_layers_alone_and_the_client_the_rest_unchanged(oracle, family, tmp_path):
    pinned = cut_model(planned(oracle), oracle.directory, tmp_path / "out")
    whole = load_file(oracle.directory / "model.safetensors")
    ends = tensors_of(tmp_path / "out" / "client")
    assert ends.keys() == ENDS[family]
    seen = dict(ends)
    for stage in pinned.stages:
        layers = tensors_of(tmp_path / "out" / f"stage{stage.stage_idx}")
        assert all(".h." in name or ".layers." in name for name in layers)
        seen |= layers
    assert seen.keys() == whole.keys()
    assert all(np.array_equal(tensor, whole[name]) for name, tensor in seen.items())
    assert load_manifest(tmp_path / "out" / "manifest.json") == pinned
    assert (tmp_path / "out" / "client" / "config.json").is_file()
    core = json.loads((tmp_path / "out" / "stage0" / "manifest.json").read_text())
    assert parse_manifest(json.dumps(core)).core_hash() == pinned.core_hash()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_a_part_in_either_layout_computes_as_the_whole_model(oracle, family, tmp_path, precision):
    manifest = planned(oracle)
    shards = [load_client(oracle, oracle.directory, manifest.client.weight_hashes, precision)]
    for in_one_file in (False, True):
        out = tmp_path / str(in_one_file)
        pinned = cut_model(manifest, oracle.directory, out, precision, in_one_file=in_one_file)
        assert pinned.client.precision == precision
        assert (out / "client" / CLIENT_FILE).is_file() is in_one_file
        part = out / "client"
        shards.append(load_client(oracle, part, pinned.client.weight_hashes, precision))
    stored = stored_tensors(part / CLIENT_FILE)
    names = {name for name in stored if name.split(".")[-1] in {"weight", "bias"}}
    assert names == OLDER[family]
    first, *others = map(computed, shards)
    for other in others:
        assert all(map(np.array_equal, first, other))


def test_a_file_without_a_norm_takes_the_one_of_the_model_beside_it(oracle, tmp_path):
    pinned = cut_model(planned(oracle), oracle.directory, tmp_path / "out", in_one_file=True)
    part = tmp_path / "out" / "client"
    tensors = tensors_of(part)
    bare = {name: each for name, each in tensors.items() if not name.startswith("norm.")}
    bare["lm_head.weight"] = 2 * bare["lm_head.weight"]  # which the model beside it has otherwise
    save_file(bare, part / CLIENT_FILE)
    with pytest.raises(ModelError, match=r"no tensor .*(norm|ln_f)"):
        load_client(oracle, part / CLIENT_FILE, None)
    shutil.copy(oracle.directory / "model.safetensors", part)
    own, whole = load_client(oracle, part / CLIENT_FILE, None), load_client(oracle, part, None)
    with pytest.raises(ModelError, match="1 weight hashes are given, but the stage reads 2"):
        load_client(oracle, part / CLIENT_FILE, pinned.client.weight_hashes)
    (rows, doubled), (expected, logits) = computed(own), computed(whole)
    assert np.array_equal(rows, expected)
    assert np.array_equal(doubled, 2 * logits)


def test_an_altered_part_or_another_models_is_refused(oracle, make_oracle, tmp_path):  # noqa: F811
    pinned = cut_model(planned(oracle), oracle.directory, tmp_path / "out")
    path = tmp_path / "out" / "client" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="not the weights the manifest was written for"):
        load_client(oracle, path.parent, pinned.client.weight_hashes)
    other = make_oracle("llama-biases-linear-rope-wide-heads").directory
    with pytest.raises(ModelError):
        load_client(oracle, other, pinned.client.weight_hashes)


def test_one_stages_shard_is_the_one_that_is_pinned(oracle, tmp_path):
    pinned = cut_model(planned(oracle), oracle.directory, tmp_path / "out")
    cut_stage(pinned, 0, oracle.directory, tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "out" / "stage0").keys()


def test_layers_alone_do_for_no_stage_that_needs_an_end(oracle, tmp_path):
    cut_model(planned(oracle), oracle.directory, tmp_path / "out")
    stage = load_manifest(tmp_path / "out" / "manifest.json").stage(0)
    layers = (stage.layer_start, stage.layer_end)
    directory = tmp_path / "out" / "stage0"
    load_shard(directory, oracle.config, *layers, ends=NO_ENDS, expected_hashes=None)
    with pytest.raises(ModelError, match="is missing"):
        load_shard(directory, oracle.config, *layers, expected_hashes=None)


def test_layers_alone_weigh_in_the_balance(make_oracle):  # noqa: F811
    stages = planned(make_oracle("gpt2")).stages
    assert [stage.layer_end - stage.layer_start for stage in stages] == [2, 2]


def test_there_is_no_file_for_a_client_that_has_no_part(make_oracle, tmp_path):  # noqa: F811
    directory = make_oracle("gpt2").directory
    with pytest.raises(InputError, match="--client-file"):
        cut_model(plan(directory, PlanOptions(2)), directory, tmp_path / "out", in_one_file=True)


def test_a_model_whose_layers_take_token_ids_again_is_refused(make_oracle, monkeypatch):  # noqa: F811
    oracle = make_oracle("gpt2")
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], layers_take_ids=True))
    plan(oracle.directory, PlanOptions(2))
    with pytest.raises(ModelError, match="token ids once more"):
        planned(oracle)
    for ends in (NO_ENDS, BOTH_ENDS):
        with pytest.raises(ModelError, match="per-layer inputs"):
            required_tensors(oracle.directory, oracle.config, range(1), ends)
