"""A model that people use predicts the same with its linears elsewhere, and no lie passes."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine.tokenizer import Tokenizer
from pipeline.leakage.linear_models import LinearHost, opened_linear_model
from pipeline.leakage.modes import MODES
from pipeline.leakage.observations import read_texts
from pipeline.leakage.public_model import PublicModel
from pipeline.offload.mask_file import write_masks
from pipeline.offload.masks import open_masks
from tests.pipeline.offload.test_freivalds import KINDS

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


def test_a_thousand_wrong_answers_of_ten_kinds_are_all_found(host, tmp_path):
    """About the linears of a layer in turn, 25 of each kind to each, by a file's own checks."""
    write_masks(tmp_path / "masks", host.linears, (), 1)
    with closing(open_masks(tmp_path / "masks")) as masks:
        checks = masks.checks()
    rng = np.random.default_rng(0)
    found = 0
    for linear, check in zip(host.linears[:4], checks, strict=False):
        weight = linear.matrix.transposed().astype(np.int64)
        for wrong in KINDS * 25:
            x = rng.integers(0, 2**64, (3, linear.num_in), np.uint64)
            y = linear.product(x)
            assert check.is_product(x, y)
            found += not check.is_product(x, wrong(x, y.copy(), weight))
    assert found == 1000
