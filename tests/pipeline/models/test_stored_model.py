"""What a model's files say beside its configuration decides in which bits int4 holds a linear."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.kernels.base import LinearSpec
from pipeline.kernels.gates import SILU
from pipeline.kernels.kernel_selection import choose_kernels
from pipeline.kernels.routing import Routing
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.models.stored_model import as_stored
from pipeline.protocol.batch import Segment
from pipeline.weights.quantization import quantise
from tests.pipeline.models.family_models import make_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    make_model("qwen3_moe-0").save_pretrained(tmp_path)
    return tmp_path


def store_in_int8(model, name):
    """As a shard in int8 has it."""
    tensors = load_file(model / WEIGHTS)
    values, scales = quantise(tensors[f"{name}.weight"].numpy())
    tensors[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    scales = torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16)
    save_file(tensors | {f"{name}.weight_scale": scales}, model / WEIGHTS)


def precisions(layer):
    linears = [each for pair in layer.mlp.experts for each in pair]
    return {each.precision for each in linears}, layer.qkv_proj.precision, layer.o_proj.precision


def test_what_shares_a_matrix_with_more_bits_is_held_in_them_too(model):
    store_in_int8(model, "model.layers.0.self_attn.v_proj")
    config = as_stored(model, load_config(model), "int4")
    assert config.int8_linears == ("model.layers.0.self_attn.qkv_proj",)
    assert as_stored(model, load_config(model), "bfloat16").int8_linears == ()


def test_experts_that_are_computed_at_once_are_alike(model, kernels):
    store_in_int8(model, "model.layers.0.mlp.experts.1.down_proj")
    shard = load_shard(
        model, load_config(model), 0, 2, dtype="int4", kernels=kernels, expected_hashes=None
    )
    first, second = shard.layers
    assert precisions(first) == ({"int8"}, "int4", "int4")
    assert precisions(second) == ({"int4"}, "int4", "int4")
    assert first.mlp.is_fixed == second.mlp.is_fixed
    batch = (Segment(0, 0, 5),)
    rows = shard.forward(np.arange(5), batch, shard.new_cache(1, 16))
    (host,) = shard.kernels.to_host(rows)
    assert np.isfinite(host).all()


def test_experts_that_are_not_alike_are_no_one_operation(native):
    own = choose_kernels(native, 16)
    up, down, other = (
        own.linear(LinearSpec(64, num_out, bias=False, precision=precision))
        for num_out, precision in ((128, "int4"), (64, "int4"), (64, "int8"))
    )
    routing = Routing(1, are_normalised=True, gate=SILU)
    assert own.experts([(up, down)], routing) is not None
    assert own.experts([(up, down), (up, other)], routing) is None
