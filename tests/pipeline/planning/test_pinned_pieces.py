"""What is planned pins pieces of its files, and everyone who loads them goes by these."""

import json
import shutil

import pytest
import torch

from pipeline.agreement.manifest import Manifest, parse_manifest
from pipeline.errors import ModelError
from pipeline.models import registry
from pipeline.models.config import load_config
from pipeline.models.ends import BOTH_ENDS
from pipeline.models.registry import load_shard
from pipeline.offload.held_model import load_linears
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from pipeline.stage.model_config import load_stage
from pipeline.weights import file_pieces, verified_file
from pipeline.weights.checkpoint import weight_files
from pipeline.weights.checkpoint_header import read_header
from tests.pipeline.oracles import Pipeline, make_oracle  # noqa: F401 - a fixture
from tests.pipeline.weights.test_gguf_checkpoint import MODELS as GGUF_MODELS
from tests.pipeline.weights.test_gguf_checkpoint import Written
from tests.pipeline.weights.test_mxfp4 import Packed as Experts
from tests.pipeline.weights.test_packings import Packed

PIECE = 2048
TOKENS = torch.arange(3, 26)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(file_pieces, "MIN_PIECE_BYTES", PIECE)
    monkeypatch.setattr(verified_file, "BLOCK_BYTES", 1 << 10)


@pytest.fixture(params=[1, 2], ids="{}-threads".format)
def num_threads(request, monkeypatch):
    monkeypatch.setattr(registry, "reading_threads", lambda: request.param)


def make_model(kind, directory):
    torch.manual_seed(0)
    if kind == "gguf":
        return Written(directory, GGUF_MODELS["llama-tied"]()).path
    return (Experts(directory) if kind == "mxfp4" else Packed(directory, kind)).directory


def staged(manifest: Manifest, directories, dtype="float32", kernels="auto"):
    shards = [
        load_stage(manifest, idx, directory, dtype, kernels, "cpu", None)
        for idx, directory in enumerate(directories)
    ]
    return Pipeline(shards).greedy(TOKENS, 4)[1]


def unverified(model, dtype="float32"):
    config = load_config(model)
    shard = load_shard(model, config, 0, config.num_layers, dtype=dtype, expected_hashes=None)
    return Pipeline([shard]).greedy(TOKENS, 4)[1]


def spoil(path, name):
    """Change a byte amid a tensor; the number of its piece."""
    with path.open("rb", buffering=0) as file:
        header = read_header(file, path)
    tensor = next(each for each in header.tensors if each.name == name)
    at = len(header.raw) + (tensor.start + tensor.end) // 2
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    return at // PIECE


def test_each_file_of_several_pieces_is_pinned_by_them_once(make_oracle, tmp_path):  # noqa: F811
    make_oracle("llama-untied-gqa").model.save_pretrained(tmp_path, max_shard_size="25KB")
    manifest = plan(tmp_path, PlanOptions(2))
    files = {path.stat().st_size for path in weight_files(tmp_path)}
    pinned = {each.file_bytes for each in manifest.weight_pieces.values()}
    assert pinned == {size for size in files if size > PIECE}
    named = {digest for stage in manifest.stages for digest in stage.weight_hashes}
    assert manifest.weight_pieces.keys() <= named
    assert torch.equal(staged(manifest, [tmp_path] * 2), unverified(tmp_path))
    core = parse_manifest(json.dumps(manifest.core()))
    assert core.core_hash() == manifest.core_hash()
    assert core.weight_pieces == manifest.weight_pieces


@pytest.mark.parametrize("kind", ["gguf", "awq", "gptq act-order", "w4a16 with zeros", "mxfp4"])
@pytest.mark.usefixtures("num_threads")
def test_stages_of_packed_weights_compute_as_of_a_file_nobody_verified(tmp_path, kind):
    model = make_model(kind, tmp_path)
    manifest = plan(model, PlanOptions(2))
    assert manifest.weight_pieces
    expected = unverified(model)
    assert torch.equal(staged(manifest, [model] * 2), expected)
    pinned = cut_model(manifest, model, tmp_path / "cut")
    parts = [tmp_path / "cut" / f"stage{idx}" for idx in range(2)]
    assert not pinned.weight_pieces  # whose shard it is reads all of it
    assert torch.equal(staged(pinned, parts), expected)


@pytest.mark.usefixtures("num_threads")
def test_a_stage_refuses_a_change_in_what_it_needs_and_no_other(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    manifest, expected = plan(model, PlanOptions(2)), unverified(model)
    path = model / "model.safetensors"
    piece = spoil(path, "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=f"{path}, bytes {piece * PIECE} to"):
        load_stage(manifest, 0, model, "float32", "auto", "cpu", None)
    rest = load_stage(manifest, 1, model, "float32", "auto", "cpu", None)
    first = load_stage(manifest, 0, tiny_model, "float32", "auto", "cpu", None)
    assert torch.equal(Pipeline([first, rest]).greedy(TOKENS, 4)[1], expected)
    with pytest.raises(ModelError, match=f"{path}, bytes {piece * PIECE} to"):
        cut_model(manifest, model, tmp_path / "cut")


def test_a_clients_part_is_loaded_by_its_pieces(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    manifest = plan(model, PlanOptions(2, split="client"))

    def load():
        return load_shard(
            model, load_config(model), 0, 0, ends=BOTH_ENDS, pieces=manifest.weight_pieces,
            expected_hashes=manifest.client.weight_hashes,
        )  # fmt: skip

    path = model / "model.safetensors"
    spoil(path, "model.layers.1.mlp.up_proj.weight")
    assert load().num_weight_bytes
    piece = spoil(path, "model.embed_tokens.weight")
    with pytest.raises(ModelError, match=f"{path}, bytes {piece * PIECE} to"):
        load()


def test_linears_that_others_multiply_are_loaded_by_their_pieces(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    manifest, config = plan(model, PlanOptions(1)), load_config(model)
    spoil(model / "model.safetensors", "model.embed_tokens.weight")
    expected = load_linears(plan(tiny_model, PlanOptions(1)), config, tiny_model, None)
    found = load_linears(manifest, config, model, None)  # which have no embedding
    assert len(found) == len(expected) > 0
    spoil(model / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r", bytes \d+ to"):
        load_linears(manifest, config, model, None)


def test_false_pieces_are_not_made_good_by_the_hash_of_the_file(tiny_model):
    manifest = plan(tiny_model, PlanOptions(2))
    ((digest, pieces),) = manifest.weight_pieces.items()
    swapped = pieces.model_copy(update={"hashes": pieces.hashes[64:] + pieces.hashes[:64]})
    other = manifest.model_copy(update={"weight_pieces": {digest: swapped}})
    with pytest.raises(ModelError, match="bytes 0 to"):
        load_stage(other, 1, tiny_model, "float32", "auto", "cpu", None)
    older = manifest.model_copy(update={"weight_pieces": {}})
    load_stage(older, 1, tiny_model, "float32", "auto", "cpu", None)
