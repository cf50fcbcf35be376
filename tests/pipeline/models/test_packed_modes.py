"""Packed weights, as other programs write them, in every mode: what floats give, or refused."""

import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.codecs.secret_rotation import SecretRotation
from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.older_client_part import client_weights
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from tests.pipeline.gguf_files import Types, write_gguf
from tests.pipeline.models.test_modes import IDS, MODES, between, load, logits_of, rows_of
from tests.pipeline.oracles import randomise
from tests.pipeline.weights.test_packings import SHAPE, Packed


class PackedFile:
    """A tiny Llama as one GGUF file of 8-bit blocks, and the same in floats."""

    def __init__(self, root):
        torch.manual_seed(0)
        self.floats, self.directory = root / "floats", root / "model.gguf"
        model = randomise(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)))
        model.save_pretrained(self.floats)
        meaning = write_gguf(self.floats, self.directory, lambda _: Types.Q8_0)
        save_file(meaning, self.floats / "model.safetensors")


@pytest.fixture(scope="module", params=["gguf", "awq", "gptq"])
def model(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    return PackedFile(root) if request.param == "gguf" else Packed(root, request.param)


@pytest.fixture(scope="module")
def expected(model):
    shard = load(model.floats)
    return logits_of(shard, rows_of(shard, IDS))


def as_expected(found, expected):
    assert abs(found - expected).max() < 1e-2
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("mode", ["client", "offload", "mix"])  # those that hand out weights
def test_a_mode_gives_what_it_gives_of_unpacked_weights(model, expected, tmp_path, mode):
    as_expected(MODES[mode](model.directory, tmp_path), expected)


def test_two_planned_stages_say_what_unpacked_weights_say(model, expected):
    rows, shards = IDS, []
    for stage in plan(model.directory, PlanOptions(2)).stages:
        shards.append(load(model.directory, range(stage.layer_start, stage.layer_end)))
        rows = rows_of(shards[-1], rows)
    assert len(shards) == 2
    assert (logits_of(shards[-1], rows) == expected).all()


@pytest.mark.parametrize("in_one_file", [False, True])
def test_ends_and_layers_that_are_cut_apart_stay_packed_and_say_the_same(
    model, expected, tmp_path, in_one_file
):
    planned = plan(model.directory, PlanOptions(1, split="client"))
    cut_model(planned, model.directory, tmp_path / "cut", in_one_file=in_one_file)
    part = client_weights(tmp_path / "cut" / "client")
    config = load_config(tmp_path / "cut" / "client")
    home = load_shard(part, config, 0, 0, ends=BOTH_ENDS, expected_hashes=None)
    away = load(tmp_path / "cut" / "stage0", ends=NO_ENDS)
    assert (between(home, away) == expected).all()


def test_a_rotation_is_refused_by_name(model, tmp_path):
    rotation = SecretRotation(bytes(32), SHAPE["hidden_size"])
    planned = plan(model.directory, PlanOptions(1, split="client"))
    with pytest.raises(ModelError, match="packed in a few bits, which a rotation would undo"):
        cut_model(planned, model.directory, tmp_path / "cut", rotation=rotation)
    assert not (tmp_path / "cut").exists()
