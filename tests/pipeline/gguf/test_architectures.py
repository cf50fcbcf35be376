"""A model of each family as llama.cpp's own package writes it says what its safetensors say."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import ModelError
from pipeline.gguf.architectures import ARCHITECTURES
from pipeline.gguf.model_files import read_model_file
from pipeline.leakage.public_model import PublicModel
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from tests.pipeline.gguf_files import Types, write_gguf
from tests.pipeline.models.family_models import BASE, YARN, make_model
from tests.pipeline.models.test_modes import IDS, MODES, load, logits_of, rows_of
from tests.pipeline.oracles import Pipeline, randomise

GPT2 = {"vocab_size": 101, "n_embd": 64, "n_head": 4, "n_positions": 64, "eos_token_id": 2}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}
OWN = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, n_layer=2, bos_token_id=1)),
    "gpt2-untied": lambda: GPT2LMHeadModel(
        GPT2Config(**GPT2, n_layer=2, bos_token_id=1, n_inner=96, tie_word_embeddings=False)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**BASE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
                       norm_topk_prob=True)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**BASE, **GPT_OSS, rope_parameters=YARN | {"truncate": False})
    ),
    "gpt_oss-unscaled": lambda: GptOssForCausalLM(
        GptOssConfig(**BASE | {"num_hidden_layers": 2}, **GPT_OSS, attention_bias=False,
                     rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    ),
}  # fmt: skip
# Of those that transformers is held against, what a GGUF file can say.
FAMILIES = (
    "mistral-0", "mixtral-0", "mixtral-2", "qwen3-1", "olmo2-0", "olmo2-2", "olmo3-1", "olmo3-2",
    "phi3-0", "phi3-1", "phi3-2",
)  # fmt: skip
MODELS = (*OWN, *FAMILIES)
# In blocks of 32, experts by those that are gpt-oss's own.
KINDS = {
    "attn_q": Types.Q8_0, "attn_k": Types.Q5_0, "attn_v": Types.Q4_1, "attn_qkv": Types.Q5_1,
    "attn_output": Types.Q4_0, "ffn_gate_exps": Types.MXFP4, "ffn_up_exps": Types.MXFP4,
    "ffn_down_exps": Types.Q5_0, "ffn_gate_inp": Types.F32, "ffn_up": Types.F16,
    "ffn_down": Types.Q8_0, "position_embd": Types.F32, "output": Types.BF16,
}  # fmt: skip


class Written:
    """A model directory, and the same as one file of floats and one of blocks."""

    def __init__(self, root, name):
        torch.manual_seed(0)
        self.directory, self.path, self.packed = root / "hf", root / "f.gguf", root / "p.gguf"
        randomise(OWN[name]() if name in OWN else make_model(name)).save_pretrained(self.directory)
        write_gguf(self.directory, self.path, lambda _: Types.F32)
        meaning = write_gguf(
            self.directory, self.packed, lambda each: KINDS.get(each.split(".")[-2], Types.Q8_0)
        )
        self.meaning = root / "meaning"
        self.meaning.mkdir()
        config = (self.directory / "config.json").read_bytes()
        (self.meaning / "config.json").write_bytes(config)
        save_file(meaning, self.meaning / "model.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Written(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def logits(*shards):
    return Pipeline(list(shards)).greedy(torch.arange(3, 26), 4)[1]


def whole(model, dtype="float32"):
    config = load_config(model)
    return load_shard(model, config, 0, config.num_layers, dtype=dtype, expected_hashes=None)


def assert_same(name, found, expected):
    """Bit for bit; a factor that is computed of two numbers for checkpoints is in a file as one."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if name == "phi3-2" else 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_floats_computes_what_the_directory_does_that_it_was_made_of(written, name):
    model = written(name)
    assert_same(name, logits(whole(model.path)), logits(whole(model.directory)))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_blocks_computes_what_these_mean(written, name):
    model = written(name)
    assert_same(name, logits(whole(model.packed)), logits(whole(model.meaning)))


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "mixtral-0"])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_file_of_blocks_computes_so_in_each_precision(written, name, dtype):
    model = written(name)
    assert torch.equal(logits(whole(model.packed, dtype)), logits(whole(model.meaning, dtype)))


@pytest.mark.parametrize("name", ["gpt2-untied", "gpt_oss", "phi3-2"])
@pytest.mark.parametrize("precision", [None, "bfloat16", "int8", "int4"])
def test_stages_that_are_cut_of_a_file_compute_what_it_does(written, tmp_path, name, precision):
    model = written(name)
    pinned = cut_model(
        plan(model.packed, PlanOptions(2)), model.packed, tmp_path / "cut", precision
    )
    shards = []
    for stage in pinned.stages:
        part = tmp_path / "cut" / f"stage{stage.stage_idx}"
        config = load_config(part, pinned.config_hash)
        shards.append(
            load_shard(
                part, config, stage.layer_start, stage.layer_end, dtype=precision or "float32",
                expected_hashes=stage.weight_hashes,
            )
        )  # fmt: skip
    assert torch.equal(logits(*shards), logits(whole(model.packed, precision or "float32")))


def test_a_configuration_is_spelt_as_manifests_have_it_pinned(written):
    fields = json.loads(read_model_file(written("mistral-0").path / "config.json", 1 << 20))
    assert list(fields) == [
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id", "eos_token_id",
        "rope_scaling", "attention_bias", "mlp_bias",
    ]  # fmt: skip


def test_what_is_known_of_public_weights_is_read_of_a_file_as_of_a_directory(written):
    model = written("gpt2")  # whose matrices lie the other way round there
    found, expected = (PublicModel.load(each, ()) for each in (model.path, model.directory))
    np.testing.assert_array_equal(found.readers, expected.readers)
    np.testing.assert_array_equal(found.positions, expected.positions)


def test_masked_linears_take_a_files_matrices(written, tmp_path):
    model = written("gpt2")
    found = MODES["offload"](model.packed, tmp_path)
    expected = logits_of(shard := load(model.meaning), rows_of(shard, IDS))
    assert abs(found - expected).max() < 1e-2


def file_of(path, architecture, values, tensors):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {
        "embedding_length": 32, "block_count": 1, "context_length": 8, "attention.head_count": 2,
        "attention.sliding_window": 4, "feed_forward_length": 32, **values,
    }.items():  # fmt: skip
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EMBEDDING = {"token_embd.weight": np.zeros((8, 32), np.float32)}
EXPERTS = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32}


def stack(count, *rest):
    return EMBEDDING | {"blk.0.ffn_up_exps.weight": np.zeros((count, *rest), np.float32)}


REFUSED = {
    "experts that are another number": ("qwen3moe", EXPERTS, stack(3, 32, 32), "there are 2 exp"),
    "experts without a weight": ("gpt-oss", EXPERTS, stack(2, 0, 32), "there are 2 experts"),
    "experts of which none is told": ("qwen3moe", {}, EMBEDDING, r"expert_\w+count is missing"),
    "experts of a family that has none": ("olmo2", {"expert_count": 2}, EMBEDDING, "mixture of"),
    "experts that all rows pass through": (
        "qwen3moe", EXPERTS | {"expert_shared_count": 1}, EMBEDDING, "which is not computed",
    ),
    "long factors without short ones": (
        "phi3", {}, EMBEDDING | {"rope_factors_long.weight": np.ones(8, np.float32)},
        "and not the other",
    ),
    "heads that turn in part": (
        "olmo2", {"rope.dimension_count": 8}, EMBEDDING, "turn part of a head",
    ),
    "heads that turn more than they have": (
        "phi3", {"rope.dimension_count": 64}, EMBEDDING, "turn part of a head",
    ),
    "layers without number": (
        "olmo2", {"block_count": (1 << 32) - 1}, EMBEDDING, "block_count is 4294967295",
    ),
    "queries that grow with their position": ("mistral3", {}, EMBEDDING, "'mistral3' is not"),
    "a layer twice": (
        "qwen3", {}, EMBEDDING | {"blk.00.attn_norm.weight": np.ones(32, np.float32)},
        "blk.00.attn_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_used_is_refused_in_one_line(tmp_path, name):
    architecture, values, tensors, message = REFUSED[name]
    path = file_of(tmp_path / "model.gguf", architecture, values, tensors)
    with pytest.raises(ModelError, match=message) as caught:
        load_shard(path, load_config(path), 0, 1, expected_hashes=None)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_architecture_that_is_read_is_one_of_the_packages():
    assert ARCHITECTURES.keys() <= set(gguf.MODEL_ARCH_NAMES.values())


def test_special_tokens_of_phi_3_take_the_spaces_behind_them_along(tmp_path):
    tokens = ["<unk>", "<s>", "<|end|>", "\u2581", "a", "\u2581a", "<|endoftext|>"]
    for architecture, spaces in (("phi3", 0), ("llama", 1)):
        writer = gguf.GGUFWriter(tmp_path / f"{architecture}.gguf", architecture)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
        writer.add_token_types([2, 3, 3, 1, 1, 1, 3])
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        tokenizer = Tokenizer(tmp_path / f"{architecture}.gguf" / "tokenizer.json")
        assert list(tokenizer.encode("a<|end|> a")) == [4, 2, *([5] if spaces else [4])]
        assert list(tokenizer.encode("<|endoftext|> a")) == [6, 5]
