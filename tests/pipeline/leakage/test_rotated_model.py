"""A rotated model is the same function of tokens to logits, and hides no token by that."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.leakage.attacker import Attacker
from pipeline.leakage.attacks.known_weights import known_weights
from pipeline.leakage.modes import MODES
from pipeline.leakage.observations import observe
from pipeline.leakage.rotated_model import load_rotated
from pipeline.leakage.utility import ModePipeline, measure_utility

FAMILIES = ["gpt2", "llama-untied-gqa", "llama-biases-linear-rope-wide-heads"]
TEXTS = [(7, 3, 99, 3, 45, 12, 8, 64), (1, 2, 3, 98, 97, 96, 50, 51)]


@pytest.fixture(scope="module")
def rotated(make_oracle):
    return lambda family: load_rotated(
        make_oracle(family).directory, (1, 2), np.random.default_rng(5)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_its_logits_are_the_models(public, rotated, family):
    pipelines = (
        ModePipeline(public(family), MODES["plain"]),
        ModePipeline(rotated(family), MODES["rotate"]),
    )
    utility = measure_utility(*pipelines, TEXTS, None)
    assert 0 < utility.max_logit_difference < 1e-3
    assert utility.greedy_agreement == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["rotate", "rotate-int8"])
def test_its_weights_give_its_rows_away(public, rotated, family, layer, name):
    model = public(family)
    seen = observe(model, rotated(family), MODES[name], TEXTS)
    attacker = Attacker(model, 8)
    for index, text in enumerate(TEXTS):
        own, plain = seen.observed[index][layer], seen.public[index][layer]
        assert np.abs(own - plain).max() > 0.1
        lengths = np.linalg.norm(own, axis=1) / np.linalg.norm(plain, axis=1)
        assert np.abs(lengths - 1).max() < 0.01
        comparison = known_weights(seen.evidence(index, layer, 0))
        assert tuple(attacker.recover(comparison, layer, len(text))) == text


def test_a_width_without_a_rotation_is_refused(tmp_path, tiny_model):
    fields = (
        (tiny_model / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 2062')
    )
    (tmp_path / "config.json").write_text(fields)
    with pytest.raises(InputError, match="no rotation for width 2062"):
        load_rotated(tmp_path, (), np.random.default_rng(0))
