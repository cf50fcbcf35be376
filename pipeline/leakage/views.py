"""What a mode's server holds instead of the model's rows, and what the next layers make of it.

A view is a few functions of rows [tokens, hidden]. Its randomness is handed in: a secret is drawn
once for all sessions, noise anew for each.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from pipeline.codecs.gaussian_noise import KEY_BYTES, GaussianNoise
from pipeline.dtypes import Floats
from transport.frozen import frozen

REACH = 1 << 30  # of weights in fixed point, about: it decides how many bits of a row are sent
Change = Callable[[Floats], Floats]
# Not imported before somebody draws: numpy's generators are ten libraries.
Random: TypeAlias = "np.random.Generator"


@frozen
class View:
    """`observe`: rows as the server holds them; `restore`: as they arrive behind a link again.

    `readers`: the server's own of the public weights that read rows, [outputs, hidden]. `disturb`:
    what is done to embedded rows for good, and goes through all layers.
    """

    observe: Change
    restore: Change
    readers: Change
    disturb: Change


def _same(rows: Floats) -> Floats:
    return rows


def plain(hidden_dim: int, rng: Random) -> View:
    """Rows as they are computed."""
    del hidden_dim, rng
    return View(_same, _same, _same, _same)


def permuted(hidden_dim: int, rng: Random) -> View:
    """The hidden dimensions in a secret order, and the weights with them."""
    order = rng.permutation(hidden_dim)
    back = np.argsort(order)

    def permute(rows: Floats) -> Floats:
        return rows[..., order]

    return View(permute, lambda rows: rows[..., back], permute, _same)


def noisy(sigma: float, clip: float) -> Callable[[int, Random], View]:
    """Embedded rows clipped to a length, with Gaussian noise: of another session each time."""

    def make(hidden_dim: int, rng: Random) -> View:
        def disturb(rows: Floats) -> Floats:
            noise = GaussianNoise(sigma, clip, hidden_dim, rng.bytes(KEY_BYTES))
            return noise.apply(rows, [(0, 0, len(rows))])

        return View(_same, _same, _same, disturb)

    return make


def masked(hidden_dim: int, rng: Random) -> View:
    """Rows in fixed point under masks of their own, as numbers from -1 to 1: what is sent."""
    from pipeline.offload.fixed_point import to_ring  # noqa: PLC0415 (attacks alone look at rows)

    del hidden_dim

    def mask(rows: Floats) -> Floats:
        words, _ = to_ring(rows.reshape(-1, rows.shape[-1]), REACH)
        words = words + rng.integers(0, 1 << 64, words.shape, np.uint64)
        sent: Floats = (words.view(np.int64) * 2.0**-63).astype(np.float32).reshape(rows.shape)
        return sent

    return View(mask, _same, _same, _same)


def mixed(hidden_dim: int, rng: Random) -> View:
    """The rows of one text mixed with each other, anew at every layer."""
    from pipeline.offload.mixing import Mixture  # noqa: PLC0415 (attacks alone look at rows)

    del hidden_dim

    def mix(rows: Floats) -> Floats:
        mixture = Mixture(len(rows), rng.bytes(KEY_BYTES))
        sent: Floats = mixture.mix(rows.astype(np.float64)).astype(np.float32)
        return sent

    return View(mix, _same, _same, _same)
