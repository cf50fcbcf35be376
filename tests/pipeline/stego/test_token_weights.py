from decimal import Decimal, localcontext
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.stego.errors import StegoError
from pipeline.stego.token_weights import token_weights
from tests.pipeline.stego.distributions import weighted

# Made of whole numbers alone, so the same everywhere: 49,152 logits between -30 and 0.
EXAMPLE = (np.arange(49_152) * 7919 % 30_011).astype(np.float32) / np.float32(-1000)


def divergence(logits, found):
    """KL of exact softmax from the weights, in bits, in decimal arithmetic."""
    with localcontext() as context:
        context.prec = 50
        exact = [Decimal(float(each)).exp() for each in logits]
        total = sum(exact)
        parts = (
            p / total * ((p / total) / (Decimal(int(w)) / found.total)).ln()
            for p, w in zip(exact, found.weights, strict=True)
        )
        return float(sum(parts))


@given(arrays(np.float32, st.integers(1, 60), elements=st.floats(-80, 80, width=32)))
def test_weights_are_in_proportion_to_the_exponentials(logits):
    found = token_weights(logits)
    assert found.total == sum(map(int, found.weights)) < 2**62
    assert found.weights.min() >= 1
    assert divergence(logits, found) < 1e-12


def test_a_whole_vocabulary_is_weighed_as_exactly():
    found = token_weights(EXAMPLE)
    assert found.ids.size == EXAMPLE.size
    assert divergence(EXAMPLE[::16], token_weights(EXAMPLE[::16])) < 1e-12
    shares = found.weights / found.total
    softmax = np.exp(EXAMPLE.astype(np.longdouble))
    assert np.abs(shares - softmax / softmax.sum()).sum() < 1e-9


def test_weights_are_these_to_the_last_bit_on_every_machine():
    digest = sha256(token_weights(EXAMPLE).weights.astype("<u8").tobytes()).hexdigest()
    assert digest == "3bc34f6a94ddceb99f4c8a8b0f1ffb9ec00c368d78a5de89c43232a48c03c444"


def test_excluded_tokens_have_no_weight():
    logits = np.full(100, -np.inf, np.float32)
    logits[[3, 40, 99]] = [0, -200, 1]
    found = token_weights(logits)
    assert found.ids.tolist() == [3, 40, 99]
    assert found.weights[1] == 1


@pytest.mark.parametrize("logits", [[], [-np.inf], [1, np.nan], [1, np.inf]])
def test_logits_that_are_no_distribution_are_refused(logits):
    with pytest.raises(StegoError, match="no numbers"):
        token_weights(np.array(logits, np.float32))


def test_every_point_lies_between_the_bounds_of_its_token():
    weights = weighted(2, 1, 4)
    assert [weights.index_at(point) for point in range(7)] == [0, 0, 1, 2, 2, 2, 2]
    assert [weights.bounds(index) for index in range(3)] == [(0, 2), (2, 3), (3, 7)]


@pytest.mark.parametrize("index", [-1, 3])
def test_no_token_has_no_bounds(index):
    with pytest.raises(StegoError, match="of 3 possible"):
        weighted(2, 1, 4).bounds(index)
