"""Rows of candidates are those that a run over the whole text gives, whatever was asked before."""

import numpy as np
import pytest

from pipeline.leakage.attacker import Attacker
from pipeline.leakage.candidate_states import CandidateStates
from pipeline.leakage.evidence import RowByRow, as_they_are
from pipeline.leakage.matching import Candidates, match_text, nearest
from pipeline.leakage.next_tokens import NextTokens

FAMILIES = ["gpt2", "llama-untied-gqa"]
TEXT = [7, 3, 99, 3, 45, 12, 8, 64]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_what_was_asked_before(public, family):
    model = public(family)
    states = CandidateStates(model, 2, num_slots=3, num_positions=16)
    rng = np.random.default_rng(1)
    for _ in range(12):
        prefix = rng.integers(0, 101, rng.integers(0, 12)).tolist()
        shared = TEXT[: rng.integers(0, 6)]
        prefix = (shared + prefix)[:14]
        candidates = rng.integers(0, 101, rng.integers(1, 9)).tolist()
        found = states.rows(prefix, candidates)
        for row, candidate in zip(found, candidates, strict=True):
            alone = model.rows_at_cuts(model.embed([*prefix, candidate]))[2][-1]
            assert np.abs(row - alone).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_logits_are_the_oracles(public, make_oracle, family):
    import torch

    model = public(family)
    rows = model.rows_at_cuts(model.embed(TEXT))
    output = make_oracle(family).model(torch.tensor([TEXT]), output_hidden_states=True)
    for cut in (0, 1, 2):
        assert np.abs(rows[cut] - output.hidden_states[cut][0].detach().numpy()).max() < 1e-4
    assert np.abs(model.logits(rows[4]) - output.logits[0].detach().numpy()).max() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_next_tokens_come_in_the_models_order(public, family):
    model = public(family)
    expected = model.logits(model.rows_at_cuts(model.embed(TEXT))[4])[-1]
    found = NextTokens(model, 16).likeliest(tuple(TEXT), 20)
    assert found.ids.tolist() == np.argsort(-expected)[:20].tolist()
    assert np.exp(NextTokens(model, 16).likeliest((), 101).log_probabilities).sum() == (
        pytest.approx(1, abs=1e-4)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("is_guided", [False, True])
def test_plain_rows_give_the_text_back(public, family, layer, is_guided):
    model = public(family)
    observed = Attacker(model, 8)._as_compared(model.rows_at_cuts(model.embed(TEXT))[layer])
    found = Attacker(model, 8).recover(
        RowByRow(observed, as_they_are), layer, len(TEXT), is_guided=is_guided
    )
    assert list(found) == TEXT


def test_known_tokens_are_not_looked_for():
    asked = []

    def rows_of(prefix, ids):
        asked.append((list(prefix), list(ids)))
        return np.eye(8, dtype=np.float32)[list(ids)]

    observed = np.eye(8, dtype=np.float32)[[1, 2, 3]]
    found = match_text(
        RowByRow(observed, as_they_are),
        [5],  # the attacker is wrong: what is known is not put to the test
        3,
        lambda *_, is_sure: iter([Candidates(np.arange(8))]),
        rows_of,
    )
    assert found == [5, 2, 3]
    assert asked[0] == ([], [5])


def test_under_noise_a_language_model_decides_between_near_ones():
    rows = np.array([[0.0] * 8, [1.0] * 8], np.float32)
    observed = np.array([[0.45] * 8], np.float32)

    def recover(log_probabilities):
        candidates = Candidates(np.arange(2), log_probabilities)
        return match_text(
            RowByRow(observed, as_they_are), [], 1, lambda *_, is_sure: iter([candidates]),
            lambda prefix, ids: rows[list(ids)],
        )  # fmt: skip

    assert recover(None) == [0]
    assert recover(np.array([-9.0, -0.01], np.float32)) == [1]


def test_nearest_takes_any_number_of_rows():
    table = np.random.default_rng(0).standard_normal((300, 5)).astype(np.float32)
    ids = np.arange(150)
    assert (nearest(table[ids] + 1e-3, table) == ids).all()
