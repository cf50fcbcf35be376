"""Our shards against transformers, and every split against one process."""

import copy
import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.models.registry import layer_bytes, required_tensors
from pipeline.protocol.batch import Segment

TOLERANCE = 1e-4


def test_greedy_tokens_and_logits_equal_transformers(oracle, make_pipeline, token_ids):
    expected_tokens, expected = oracle.greedy(token_ids, 64)
    tokens, logits = make_pipeline(oracle.split()).greedy(token_ids, 64)
    assert tokens == expected_tokens
    assert (logits - expected).abs().max() <= TOLERANCE


def test_every_row_of_a_prefill_equals_transformers(oracle, make_pipeline, token_ids):
    logits = make_pipeline(oracle.split()).logits(token_ids, [Segment(0, 0, len(token_ids))])
    assert (logits - oracle.logits(token_ids)).abs().max() <= TOLERANCE


def test_a_prefill_in_chunks_equals_transformers(oracle, make_pipeline, token_ids):
    pipeline, rows = make_pipeline(oracle.split()), []
    for start, end in itertools.pairwise((0, 5, 6, 14, len(token_ids))):
        rows.append(pipeline.logits(token_ids[start:end], [Segment(0, start, end - start)]))
    assert (torch.cat(rows) - oracle.logits(token_ids)).abs().max() <= TOLERANCE


def test_every_split_is_bitwise_equal_to_one_process(oracle, make_pipeline, token_ids):
    layers = range(1, oracle.config.num_layers)
    splits = [(at,) for at in layers] + list(itertools.combinations(layers, 2))
    expected_tokens, expected = make_pipeline(oracle.split()).greedy(token_ids, 16)
    for bounds in splits:
        tokens, logits = make_pipeline(oracle.split(*bounds)).greedy(token_ids, 16)
        assert tokens == expected_tokens, bounds
        assert torch.equal(logits, expected), bounds


def test_a_rerun_is_bitwise_equal(oracle, make_pipeline, token_ids):
    pipeline = make_pipeline(oracle.split(2))
    first = pipeline.greedy(token_ids, 8)
    for cache in pipeline.caches:
        cache.clear()
    second = pipeline.greedy(token_ids, 8)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_requests_side_by_side_equal_each_alone(oracle, make_pipeline, token_ids):
    """Rows of one product may round differently in company: 1e-4, and the same greedy tokens."""
    prompts = [token_ids[:9], token_ids[9:10], token_ids[10:]]
    alone = [make_pipeline(oracle.split()).greedy(prompt, 6) for prompt in prompts]
    pipeline = make_pipeline(oracle.split(1), num_slots=4)
    slots, rows, positions = (2, 0, 3), prompts, [0, 0, 0]
    for step in range(6):
        batch = [
            Segment(slot, position, len(row))
            for slot, position, row in zip(slots, positions, rows, strict=True)
        ]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        logits = pipeline.logits(torch.cat(rows), batch)[ends]
        expected = torch.stack([each[1][step] for each in alone])
        assert (logits - expected).abs().max() <= TOLERANCE
        assert logits.argmax(-1).tolist() == [each[0][step] for each in alone]
        positions = [at + len(row) for at, row in zip(positions, rows, strict=True)]
        rows = list(logits.argmax(-1).unsqueeze(1))


@pytest.mark.parametrize("family", ["gpt2", "llama-tied-llama3-rope"])
@pytest.mark.parametrize("bounds", [(), (2,)], ids=str)
def test_a_head_of_its_own_is_used_though_the_configuration_ties_it(
    make_oracle, oracle_class, make_pipeline, token_ids, tmp_path, caplog, family, bounds
):
    tied = make_oracle(family)
    shutil.copytree(tied.directory, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    head = torch.randn(tied.config.vocab_size, tied.config.hidden_dim)
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    model = copy.deepcopy(tied.model)
    model.lm_head.weight = torch.nn.Parameter(head)
    own = oracle_class(tmp_path, model)
    assert own.config.tie_word_embeddings
    expected, expected_logits = own.greedy(token_ids, 6)
    tokens, logits = make_pipeline(own.split(*bounds)).greedy(token_ids, 6)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() <= 1e-4
    assert caplog.text.count("event=own_head") == 1
    sizes = layer_bytes(tmp_path, own.config)
    assert sizes[2] - layer_bytes(tied.directory, tied.config)[2] == 0
    last = required_tensors(tmp_path, own.config, range(3, 4))
    assert "lm_head.weight" in last
