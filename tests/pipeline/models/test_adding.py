"""Who follows ADDING.md has a family of models that a stage serves, in every split."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipeline.codecs.registry import make_codec
from pipeline.errors import ModelError
from pipeline.models import shard_model
from pipeline.models.config import load_config
from pipeline.models.families import FAMILIES
from pipeline.models.registry import load_shard, required_tensors
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, token_ids_from_wire, token_ids_to_wire
from pipeline.stage.step_executor import StageCore
from tests.pipeline.models.family_models import make_model
from tests.pipeline.oracles import randomise
from tests.pipeline.pages import written_down

PAGE = Path(shard_model.__file__).with_name("ADDING.md")
FIELDS = {
    "model_type": "plain",
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


@pytest.fixture
def family(monkeypatch):
    for name in ("normed", "plain"):  # what the page adds is gone behind a test
        monkeypatch.setitem(FAMILIES, name, None)
    return written_down(PAGE, "plain")


@pytest.fixture
def directory(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    random = np.random.default_rng(4)
    shapes = {
        "embed.weight": (50, 64),
        "norm.weight": (64,),
        "norm.bias": (64,),
        "lm_head.weight": (50, 64),
    }
    for index in range(3):
        shapes |= {
            f"layers.{index}.{name}": shape
            for name, shape in {
                "norm_1.weight": (64,), "norm_1.bias": (64,), "norm_2.weight": (64,),
                "norm_2.bias": (64,), "attention.qkv.weight": (192, 64),
                "attention.qkv.bias": (192,), "attention.out.weight": (64, 64),
                "mlp.up.weight": (96, 64), "mlp.up.bias": (96,), "mlp.down.weight": (64, 96),
                "mlp.down.bias": (64,),
            }.items()
        }  # fmt: skip
    weights = {
        name: (0.3 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


def generate(directory, bounds, kernels, count=8):
    """Greedy tokens of stages that pass on what they compute."""
    found = load_config(directory)
    limits = SessionLimits(1, 64, 32, make_codec("F32", 64))
    edges = [0, *bounds, found.num_layers]
    shards = [
        load_shard(directory, found, start, end, kernels=kernels, expected_hashes=None)
        for start, end in itertools.pairwise(edges)
    ]
    cores = [StageCore(shard, limits) for shard in shards]
    ids, position, tokens = list(range(3, 12)), 0, []
    for step in range(count):
        segment = Segment(0, position, len(ids))
        header = StepHeader(StepKind.STEP, step, (segment,), (Want.TOKEN,), ())
        tensors = (token_ids_to_wire(np.array(ids, np.uint32)),)
        for core in cores:
            tensors = core.step(header, tensors)
        position += len(ids)
        ids = token_ids_from_wire(tensors[0]).tolist()
        tokens += ids
    return tokens


def reference(directory, count=8):
    """The same model written down in torch, all of it anew for every token."""
    from safetensors.torch import load_file

    weights, ids = load_file(directory / "model.safetensors"), list(range(3, 12))

    def norm(x, name):
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, (64,), scale, shift, 1e-5)

    def linear(x, name):
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rotated(x):
        angles = torch.outer(torch.arange(len(ids)), 1e4 ** -(torch.arange(0, 16, 2) / 16))
        cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
        return x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin

    while len(ids) < 9 + count:
        x = weights["embed.weight"][ids]
        for index in range(3):
            layer = f"layers.{index}."
            qkv = linear(norm(x, layer + "norm_1"), layer + "attention.qkv").view(-1, 12, 16)
            q, k, v = rotated(qkv[:, :4]), rotated(qkv[:, 4:8]), qkv[:, 8:]
            mixed = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
            )
            x = x + linear(mixed.transpose(0, 1).reshape(-1, 64), layer + "attention.out")
            up = linear(norm(x, layer + "norm_2"), layer + "mlp.up").relu()
            x = x + linear(up, layer + "mlp.down")
        ids.append(int(linear(norm(x[-1:], "norm"), "lm_head").argmax()))
    return ids[9:]


@pytest.mark.parametrize("bounds", [(), (1,), (1, 2)], ids=str)
def test_the_pages_family_says_what_its_model_says(directory, kernels, bounds):
    assert generate(directory, bounds, kernels) == reference(directory)


@pytest.mark.usefixtures("family")
def test_a_family_that_is_nearly_llama_is_a_reader(tmp_path, kernels):
    qwen = randomise(make_model("qwen3-0"))
    qwen.save_pretrained(tmp_path)
    expected = generate(tmp_path, (), kernels)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "normed"}))
    assert load_config(tmp_path).architecture == "normed"
    assert generate(tmp_path, (1,), kernels) == expected


def test_a_stage_of_it_loads_its_own_layers_alone(directory):
    names = required_tensors(directory, load_config(directory), range(1, 2))
    assert {name.partition(".norm")[0] for name in names if "norm" in name} == {"layers.1"}


def test_what_it_does_not_compute_is_refused(directory):
    (directory / "config.json").write_text(json.dumps(FIELDS | {"hidden_act": "gelu"}))
    with pytest.raises(ModelError, match="hidden_act='gelu'"):
        load_config(directory)


def test_without_the_page_there_is_no_such_family(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    with pytest.raises(ModelError, match="model_type 'plain' is not supported"):
        load_config(tmp_path)
