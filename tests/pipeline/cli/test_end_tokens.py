import json
import logging

import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as HfTokenizer

from pipeline.agreement.manifest import build_manifest
from pipeline.cli.pipeline_access import end_tokens
from pipeline.engine.tokenizer import Tokenizer


def manifest_with(*eos_token_ids):
    fields = {
        "model_name": "m",
        "model_version": "1",
        "total_layers": 1,
        "stages": [{"stage_idx": 0, "layer_start": 0, "layer_end": 1, "weight_hashes": []}],
        "activation_spec": {"dtype": "F32", "hidden_dim": 8, "max_seq_len": 8},
        "eos_token_ids": eos_token_ids,
    }
    return build_manifest(fields, "test")


@pytest.fixture
def tokenizer_with(tmp_path):
    def make(**tokenizer_config):
        library = HfTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        library.add_special_tokens([AddedToken("<|im_end|>", special=True)])
        library.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        return Tokenizer(tmp_path / "tokenizer.json")

    return make


def test_a_text_ends_at_what_the_manifest_or_the_tokenizer_names(tokenizer_with):
    tokenizer = tokenizer_with(eos_token="<|im_end|>")
    assert end_tokens(manifest_with(), tokenizer) == {2}
    assert end_tokens(manifest_with(1), tokenizer) == {1, 2}


def test_a_model_without_an_end_is_warned_of(tokenizer_with, caplog):
    with caplog.at_level(logging.WARNING):
        assert end_tokens(manifest_with(1), tokenizer_with()) == {1}
        assert "no_end_token" not in caplog.text
        assert end_tokens(manifest_with(), tokenizer_with()) == frozenset()
    assert "event=no_end_token" in caplog.text
