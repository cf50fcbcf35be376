"""A model whose prompts' rows leave mixed: the same text, and rows that cannot be mixed stay."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.models.config import load_config
from pipeline.models.layer_parts import OWN
from pipeline.models.registry import load_shard
from pipeline.offload.errors import WrongProduct
from pipeline.offload.linear_parts import MixedParts
from pipeline.offload.mixing import CONDITION, MIN_ROWS, Mixture
from pipeline.protocol.batch import Segment


class NearParts(MixedParts):
    """With a worker in this process."""

    def __init__(self, multiply):
        self.multiply = multiply
        super().__init__()


def load(model_dir, parts):
    config = load_config(model_dir)
    return load_shard(model_dir, config, 0, config.num_layers, parts=parts, expected_hashes=None)


def run(shard, num_rows, num_steps=3):
    """Logits of a prompt's last row and of some steps behind it."""
    cache, rows, found = shard.new_cache(1, 64), np.arange(90, 90 + num_rows), []
    for _ in range(num_steps):
        hidden = shard.forward(rows, (Segment(0, cache.lengths[0], len(rows)),), cache)
        (token,), logits = shard.results(hidden[-1:])
        found.append(logits[0].copy())
        rows = np.array([token])
    return np.stack(found)


def test_a_prompt_is_mixed_and_what_comes_alone_stays(tiny_model, multiply):
    asked = []

    def ask(index, rows, num_out):
        asked.append((index, len(rows)))
        return multiply(index, rows, num_out)

    plain = run(load(tiny_model, OWN), 20)
    mixed = run(load(tiny_model, NearParts(ask)), 20)
    assert np.abs(mixed - plain).max() < 1e-4
    assert asked == [(index, 20) for index in range(16)]


def test_a_prompt_too_short_to_mix_is_computed_here(tiny_model):
    def ask(index, rows, num_out):
        raise AssertionError("nobody is to be asked")

    plain = run(load(tiny_model, OWN), MIN_ROWS - 1)
    assert np.abs(run(load(tiny_model, NearParts(ask)), MIN_ROWS - 1) - plain).max() < 1e-5


def test_a_wrong_answer_is_refused(tiny_model, multiply):
    def ask(index, rows, num_out):
        return multiply(index, rows, num_out) + np.uint64(1 << 63)

    with pytest.raises(WrongProduct, match="is wrong, and was not used"):
        run(load(tiny_model, NearParts(ask)), 20)


@pytest.mark.parametrize("num_rows", range(MIN_ROWS))
def test_too_few_rows_are_not_mixed(num_rows):
    with pytest.raises(InputError, match=f"{num_rows} rows cannot be mixed"):
        Mixture(num_rows)


@pytest.mark.parametrize("num_rows", [MIN_ROWS, 33, 200])
def test_mixing_is_undone_exactly_enough_and_loses_no_more_than_its_condition(num_rows):
    rows = np.random.default_rng(0).standard_normal((num_rows, 16))
    mixture = Mixture(num_rows)
    assert np.abs(mixture.unmix(mixture.mix(rows)) - rows).max() < 1e-12
    matrix = mixture.mix(np.eye(num_rows))
    assert np.linalg.cond(matrix) <= CONDITION * (1 + 1e-9)
    # lengths and products are others
    gram = mixture.mix(rows) @ mixture.mix(rows).T
    assert not np.allclose(gram, rows @ rows.T, atol=0.1)


def test_every_mixture_is_another():
    rows = np.ones((MIN_ROWS, 4))
    assert not np.allclose(Mixture(MIN_ROWS).mix(rows), Mixture(MIN_ROWS).mix(rows))


def test_a_row_that_holds_no_number_is_no_numbers_and_leaves_the_others_alone(tiny_model, multiply):
    linear = load(tiny_model, NearParts(multiply)).layers[0].o_proj
    rows = np.random.default_rng(0).standard_normal((10, linear.num_in)).astype(np.float32)
    expected = linear(rows, np.empty((10, linear.num_out), np.float32)).copy()
    rows[3, 5] = np.nan
    found = linear(rows, np.empty((10, linear.num_out), np.float32))
    assert np.isnan(found[3]).all()
    assert np.abs(np.delete(found - expected, 3, axis=0)).max() < 1e-5
