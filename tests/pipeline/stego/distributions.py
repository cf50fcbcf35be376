"""Token distributions as tests of codecs want them."""

import numpy as np
from hypothesis import strategies as st

from pipeline.stego.token_weights import TokenWeights, token_weights

KEY = bytes(range(32))


def weighted(*weights):
    values = np.array(weights, np.uint64)
    return TokenWeights(np.arange(len(weights)), values, int(values.sum()))


def random_weights(random, num_tokens=50, spread=2.0):
    """Weights of about three bits of entropy among 50 tokens."""
    return token_weights((random.standard_normal(num_tokens) * spread).astype(np.float32))


# One token, even ones, one that is nearly certain, and everything between.
any_weights = st.one_of(
    st.lists(st.integers(1, 2**50), min_size=1, max_size=60),
    st.lists(st.integers(1, 3), min_size=1, max_size=300),
    st.lists(st.sampled_from([1, 2**61 // 60]), min_size=1, max_size=60),
).map(lambda weights: weighted(*weights))
