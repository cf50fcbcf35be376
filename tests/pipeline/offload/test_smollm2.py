"""A model that people use predicts the same with its linears elsewhere, in either mode."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.engine.tokenizer import Tokenizer
from pipeline.leakage.linear_models import LinearHost, opened_linear_model
from pipeline.leakage.modes import MODES
from pipeline.leakage.observations import read_texts
from pipeline.leakage.public_model import PublicModel

MODEL = Path(__file__).parents[3] / "models" / "smollm2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="SmolLM2 is not here"),
]


@pytest.fixture(scope="module")
def host():
    return LinearHost.load(MODEL)


@pytest.fixture(scope="module")
def expected():
    (text,) = read_texts(Tokenizer(MODEL / "tokenizer.json"), 1, 80)
    model = PublicModel.load(MODEL, ())
    return text, model.logits(model.rows_at_cuts(model.embed(text))[30])


@pytest.mark.parametrize("name", ["offload", "mix"])
def test_every_greedy_token_is_the_plain_one(host, expected, name):
    text, plain = expected
    with opened_linear_model(MODES[name], MODEL, (), host, len(text)) as model:
        found = model.logits(model.rows_at_cuts(model.embed(text))[30])
    assert np.abs(found - plain).max() < 1e-3
    assert (found.argmax(axis=1) == plain.argmax(axis=1)).all()
