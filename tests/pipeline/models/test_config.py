"""config.json is read strictly: what we cannot compute exactly is refused by name."""

import json

import pytest

from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.models.decoder_config import DecoderConfig
from pipeline.models.registry import layer_bytes, load_shard

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
OLMO3 = LLAMA | {"model_type": "olmo3", "sliding_window": 8}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 100,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 64,
}


@pytest.fixture
def load(tmp_path):
    def write(fields, generation=None):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return load_config(tmp_path)

    return write


def test_defaults_follow_from_what_is_given(load):
    config = load(LLAMA)
    assert isinstance(config, DecoderConfig)
    assert (config.head_dim, config.num_kv_heads) == (8, 4)
    rope = config.shape(1).rope
    assert (rope.theta, rope.num_dims, rope.scaling) == (10000.0, 8, None)


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (2, None, (2,)),
        (2, {"eos_token_id": [7, 2]}, (2, 7)),
        (None, {"eos_token_id": 5}, (5,)),
        (None, {}, ()),
    ],
)
def test_end_tokens_of_both_files_count(load, own, generation, expected):
    assert load(LLAMA | {"eos_token_id": own}, generation).eos_token_ids == expected


def test_the_older_spelling_of_rope_scaling_means_the_same(load):
    old = {"type": "linear", "factor": 2.0}
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert load(LLAMA | {"rope_theta": 500.0, "rope_scaling": old}) == load(
        LLAMA | {"rope_parameters": new}
    )


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (LLAMA | {"model_type": "bert"}, "model_type 'bert' is not supported"),
        ({}, "model_type None is not supported"),
        (LLAMA | {"hidden_act": "relu"}, "hidden_act='relu'"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        (LLAMA | {"num_attention_heads": 5}, "32/5"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        (LLAMA | {"head_dim": 7}, "head_dim=7 is odd"),
        (LLAMA | {"rope_scaling": {"rope_type": "spiral", "factor": 2}}, "rope_type='spiral'"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA | {"sliding_window": 8}, "sliding_window=8"),
        (OLMO3 | {"rope_parameters": {"full_attention": 1}}, "of a type of layer are no object"),
        (OLMO3 | {"rope_parameters": {"sliding_attention": [1]}}, "are no object"),
        (GPT2 | {"activation_function": "swish"}, "activation_function='swish'"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2 | {"n_head": 5}, "32/5"),
        ([1], "holds a list"),
        (LLAMA | {"vocab_size": 10**12}, "vocab_size=1000000000000"),
        (LLAMA | {"intermediate_size": 10**12}, "intermediate_size=1000000000000"),
        (LLAMA | {"hidden_size": 2**40}, "hidden_size=1099511627776"),
        (LLAMA | {"head_dim": 2**40}, "head_dim=1099511627776"),
        (LLAMA | {"num_attention_heads": 2**40}, "num_attention_heads=1099511627776"),
        (LLAMA | {"max_position_embeddings": 2**60}, "max_position_embeddings="),
        (LLAMA | {"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        (LLAMA | {"rope_theta": float("inf")}, "rope_theta=inf"),
        (GPT2 | {"n_embd": 2**40}, "n_embd=1099511627776"),
        (GPT2 | {"n_inner": 2**40}, "n_inner=1099511627776"),
        (GPT2 | {"n_positions": 2**60}, "n_positions="),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(load, fields, told):
    with pytest.raises(ModelError) as caught:
        load(fields)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named_without_the_rest_of_the_file(load):
    with pytest.raises(ModelError) as caught:
        load({name: value for name, value in LLAMA.items() if name != "hidden_size"})
    assert str(caught.value).endswith("config.json: hidden_size: Field required")


def test_what_is_quoted_is_short(load):
    for fields in (LLAMA | {"quantization_config": "x" * 9000}, {"model_type": "x" * 9000}):
        with pytest.raises(ModelError) as caught:
            load(fields)
        assert len(str(caught.value)) < 500


def test_more_weights_than_memory_are_refused_with_their_size(load, tmp_path):
    # Each alone is a size some field may have; together they are more than an address can name.
    config = load(LLAMA | {"vocab_size": 1 << 24, "hidden_size": 1 << 20})
    with pytest.raises(ModelError, match=r"need \d{15} bytes of memory"):
        load_shard(tmp_path, config, 0, 2, expected_hashes=None)


def test_a_missing_or_broken_config_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="is it a model directory"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize("bounds", [(0, 0), (2, 1), (-1, 2), (0, 5), (4, 4)])
def test_a_range_outside_the_model_is_refused(make_oracle, bounds):
    with pytest.raises(ModelError, match=f"layers {bounds[0]}..{bounds[1]} are not a range"):
        make_oracle("gpt2").shard(*bounds)


def test_an_unknown_dtype_is_refused(make_oracle):
    oracle = make_oracle("gpt2")
    with pytest.raises(ModelError, match="dtype 'float8' is not supported: use float32"):
        load_shard(oracle.directory, oracle.config, 0, 4, dtype="float8", expected_hashes=None)


def test_layer_bytes_are_what_the_stages_hold(oracle):
    oracle = oracle.computing_with("torch")  # packed weights are padded
    embedding, layers, head = layer_bytes(oracle.directory, oracle.config)
    first, *middle, last = (oracle.shard(at, at + 1) for at in range(len(layers)))
    assert first.num_weight_bytes == embedding + layers[0]
    assert [shard.num_weight_bytes for shard in middle] == list(layers[1:-1])
    assert last.num_weight_bytes == layers[-1] + head
