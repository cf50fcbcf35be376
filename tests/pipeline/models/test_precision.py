"""bfloat16, int8 and int4: the right weights whatever the kernels, the split and the file."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard, required_tensors
from pipeline.protocol.batch import Segment
from pipeline.weights.int4 import dequantise_int4, quantise_int4
from pipeline.weights.quantization import SCALE_SUFFIX, dequantise, quantise
from pipeline.weights.tensor_sinks import WeightSink

PRECISIONS = ("bfloat16", "int8", "int4")


@pytest.fixture(params=PRECISIONS)
def dtype(request):
    return request.param


@pytest.fixture(params=["gpt2", "llama-untied-gqa", "qwen2-qkv-bias"])
def oracle(request, make_oracle, kernels):
    return make_oracle(request.param).computing_with(kernels)


def matrices(oracle, dtype="float32"):
    """Names in the file -> where they go, of all that has a precision."""
    layers = range(oracle.config.num_layers)
    planned = required_tensors(oracle.directory, oracle.config, layers, None, dtype)
    return {name: each for name, each in planned.items() if isinstance(each, WeightSink)}


def rounded(tensor, sink):
    if sink.precision == "bfloat16":
        return tensor.bfloat16().float()
    outputs = (tensor.t() if sink.is_in_out else tensor).numpy()
    is_int4 = sink.precision == "int4"
    exact = dequantise_int4(quantise_int4(outputs)) if is_int4 else dequantise(*quantise(outputs))
    return torch.from_numpy(exact.T.copy() if sink.is_in_out else exact)


def is_close(logits, expected, most=0.1):
    """Random weights amplify rounding; whatever is wrong is off by as much as logits vary."""
    return (logits - expected).square().mean().sqrt() <= most * expected.std()


def attend_to_halves(module, query, key, value, mask, **options):
    """What bfloat16 and int8 stages cache, in transformers."""
    rounded_key, rounded_value = key.half().float(), value.half().float()
    return sdpa_attention_forward(module, query, rounded_key, rounded_value, mask, **options)


AttentionInterface.register("halves", attend_to_halves)
AttentionMaskInterface.register("halves", sdpa_mask)


@pytest.fixture
def rounded_oracle(oracle, oracle_class, tmp_path, dtype):
    """The same model in transformers, with the weights and cache the precision means."""
    shutil.copytree(oracle.directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    sinks = matrices(oracle, dtype)
    tensors = {
        name: rounded(each, sinks[name]) if name in sinks else each
        for name, each in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    model = type(oracle.model).from_pretrained(tmp_path, attn_implementation="halves").eval()
    return oracle_class(tmp_path, model)


def test_logits_equal_transformers_with_the_rounded_weights(
    oracle, rounded_oracle, make_pipeline, token_ids, dtype
):
    whole = [Segment(0, 0, len(token_ids))]
    logits = make_pipeline(oracle.split(dtype=dtype)).logits(token_ids, whole)
    expected = rounded_oracle.logits(token_ids)
    if oracle.kernels == "native":
        assert is_close(logits, expected)  # activations are rounded too
    else:  # what lies between two halves may still become either
        assert (logits - expected).square().mean().sqrt() <= 1e-4
    assert (logits - oracle.logits(token_ids)).abs().max() > 1e-3  # something was rounded


def test_every_split_is_bitwise_equal_to_one_process(oracle, make_pipeline, token_ids, dtype):
    expected = make_pipeline(oracle.split(dtype=dtype)).greedy(token_ids, 6)[1]
    for bounds in ((1,), (2,), (1, 3)):
        logits = make_pipeline(oracle.split(*bounds, dtype=dtype)).greedy(token_ids, 6)[1]
        assert torch.equal(logits, expected), bounds


def test_stages_may_differ_in_precision(oracle, make_pipeline, token_ids, dtype):
    mixed = [oracle.shard(0, 2, dtype), oracle.shard(2, 4)]
    whole = [Segment(0, 0, len(token_ids))]
    logits = make_pipeline(mixed).logits(token_ids, whole)
    expected = oracle.logits(token_ids)
    assert is_close(logits, expected, 0.5 if dtype == "int4" else 0.1)
    assert (logits - expected).abs().max() > 1e-3


def test_native_weights_take_the_room_their_precision_promises(make_oracle, native):
    oracle = make_oracle("llama-untied-gqa").computing_with(native)
    sizes = [oracle.shard(1, 2, dtype).num_weight_bytes for dtype in ("float32", *PRECISIONS)]
    assert sizes[1] <= 0.53 * sizes[0]
    assert sizes[2] <= 0.32 * sizes[0]
    assert sizes[3] <= 0.2 * sizes[0]


@pytest.fixture
def int8_file(make_oracle, tmp_path):
    oracle = make_oracle("llama-untied-gqa")
    shutil.copytree(oracle.directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in matrices(oracle):
        values, scales = quantise(tensors[name].numpy())
        tensors[name] = torch.from_numpy(values)
        tensors[name + SCALE_SUFFIX] = torch.from_numpy(scales).view(torch.bfloat16)
    return path, tensors


def load(path, dtype):
    config = load_config(path.parent)
    return load_shard(path.parent, config, 0, 4, dtype=dtype, expected_hashes=None)


def test_weights_stored_in_int8_are_those_converted_at_load(
    int8_file, make_oracle, make_pipeline, token_ids
):
    path, tensors = int8_file
    save_file(tensors, path)
    expected = make_pipeline(make_oracle("llama-untied-gqa").split(dtype="int8"))
    found = make_pipeline([load(path, "int8")])
    assert torch.equal(found.greedy(token_ids, 4)[1], expected.greedy(token_ids, 4)[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_files_are_refused_for_other_precisions(int8_file, dtype):
    path, tensors = int8_file
    save_file(tensors, path)
    with pytest.raises(ModelError, match="is stored as I8: use weights in one of F32, F16, BF16"):
        load(path, dtype)


def test_int8_values_and_scales_come_together(int8_file, make_oracle):
    path, tensors = int8_file
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name + SCALE_SUFFIX}, path)
    with pytest.raises(ModelError, match=f"{name} is int8 without scales"):
        load(path, "int8")
    original = load_file(make_oracle("llama-untied-gqa").directory / "model.safetensors")
    save_file({**tensors, name: original[name]}, path)
    with pytest.raises(ModelError, match=f"{name} has scales and is not int8"):
        load(path, "int8")
