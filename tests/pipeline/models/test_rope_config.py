"""Rotary positions of every spelling are transformers', or refused in one line."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.models.rope import rope_frequencies

BASE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + each / 64 for each in range(32)],
    "long_factor": [1.0 + each for each in range(32)],
    "original_max_position_embeddings": 1024,
}


@pytest.fixture
def load(tmp_path):
    def write(fields):
        (tmp_path / "config.json").write_text(json.dumps(BASE | fields))
        return load_config(tmp_path)

    return write


@pytest.mark.parametrize(
    ("fields", "max_positions"),
    [
        ({}, 4096),
        ({"rope_scaling": None}, 4096),
        ({"rope_theta": 5e5, "rope_scaling": None}, 4096),
        ({"rope_parameters": {"rope_theta": 5e5}}, 4096),
        ({"rope_theta": 7e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 4096),
        ({"rope_theta": 7e5, "rope_parameters": {"rope_type": "default"}}, 4096),
        ({"rope_scaling": LINEAR}, 16384),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 1e6}, 10240),
        ({"rope_parameters": LINEAR | {"rope_theta": 5e5}}, 16384),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 4096),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}}, 4096),
        ({"rope_scaling": LLAMA3}, 4096),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}}, 4096),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 512}, 4096),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "factor": 32.0}}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5,
          "rope_parameters": LINEAR | {"rope_theta": 5e5}}, 16384),
    ],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(load, fields, max_positions):
    config = load(fields)
    oracle = LlamaRotaryEmbedding(LlamaConfig.from_dict(BASE | json.loads(json.dumps(fields))))
    assert oracle.attention_scaling == 1
    assert (
        np.abs(rope_frequencies(config.shape(0).rope) / oracle.inv_freq.numpy() - 1).max() <= 1e-6
    )
    assert config.max_positions == max_positions


@pytest.mark.parametrize(
    ("fields", "max_positions"),
    [
        ({"rope_scaling": YARN}, 16384),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 256}}, 4096),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}, "rope_theta": 1e6}, 32768),
        ({"rope_scaling": YARN | {"attention_factor": 0.7, "beta_fast": 16.0}}, 16384),
        ({"rope_scaling": YARN | {"beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5}}, 16384),
        ({"rope_parameters": YARN | {"rope_theta": 5e5, "mscale": 0.7, "truncate": False}}, 16384),
        ({"rope_scaling": LONGROPE}, 4096),
        ({"rope_scaling": LONGROPE | {"factor": 16.0}, "rope_theta": 1e6}, 4096),
        ({"rope_scaling": LONGROPE | {"attention_factor": 1.2}}, 4096),
    ],
)
@pytest.mark.parametrize("length", [1024, 1025])
def test_what_is_stretched_unevenly_is_as_transformers_has_it(load, fields, max_positions, length):
    config = load(fields)
    rope = config.shape(0).rope.within(length)
    reference = LlamaConfig.from_dict(BASE | json.loads(json.dumps(fields)))
    make = ROPE_INIT_FUNCTIONS[reference.rope_parameters["rope_type"]]
    expected, amplitude = make(reference, "cpu", seq_len=length)
    assert np.abs(rope_frequencies(rope) / expected.numpy() - 1).max() <= 1e-6
    assert abs(rope.scaling.amplitude / amplitude - 1) <= 1e-9
    assert config.max_positions == max_positions


@pytest.mark.parametrize("part", [LLAMA3 | {"rope_theta": 5e5}, LINEAR, {"rope_theta": 2e4}])
def test_parameters_given_for_each_type_of_layer_are_those_of_all(load, part):
    types = {"layer_types": ["full_attention"] * 2}
    for nested in ({"full_attention": part}, {"full_attention": part, "sliding_attention": part}):
        assert load(types | {"rope_parameters": nested}) == load({"rope_parameters": part})


def test_a_saved_model_is_loaded_as_it_was_made(make_oracle):
    oracle = make_oracle("llama-tied-llama3-rope")
    expected = oracle.model.model.rotary_emb.inv_freq
    assert torch.allclose(
        torch.from_numpy(rope_frequencies(oracle.config.shape(0).rope)), expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rope_scaling": {"rope_type": "linear"}}, "factor: Field required"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor=None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e9}}, "4096 positions stretched by"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: Field requi"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1 is not above"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor: Field required"),
        ({"rope_scaling": YARN | {"factor": 1e9}}, "4096 positions stretched by"),
        ({"rope_scaling": YARN | {"beta_fast": -1.0}}, "beta_fast=-1.0"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta=1 is not above 1"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "short_factor: Field required"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0] * 31}}, "short_factor has 31 numbers"),
        ({"rope_scaling": LONGROPE | {"long_factor": [0.0] * 32}}, "long_factor.0=0.0"),
        ({"rope_scaling": {"type": "su"}}, "rope_type='su'"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_type='mrope'"),
        ({"rope_parameters": {"rope_type": None}}, "rope_type=None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": LINEAR, "rope_parameters": LLAMA3}, "say different things"),
        ({"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LLAMA3}}, "differ"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "factor: Field required"),
        ({"rope_parameters": {"full_attention": LINEAR, "sliding_attention": None}}, "without"),
        ({"rope_parameters": LINEAR | {"full_attention": LINEAR}}, "and for all of them"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": []}, "rope_scaling"),
    ],
)
def test_what_would_be_other_positions_is_refused_in_one_line(load, fields, told):
    with pytest.raises(ModelError) as caught:
        load(fields)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
