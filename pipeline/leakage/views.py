"""What a mode's server holds instead of the model's rows, and what the next layers make of it.

A view is a few functions of rows [tokens, hidden]. Its randomness is handed in: a secret is drawn
once for all sessions, noise anew for each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.codecs.gaussian_noise import KEY_BYTES, GaussianNoise
from pipeline.dtypes import Floats

Change = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True)
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


def plain(hidden_dim: int, rng: np.random.Generator) -> View:
    """Rows as they are computed."""
    del hidden_dim, rng
    return View(_same, _same, _same, _same)


def permuted(hidden_dim: int, rng: np.random.Generator) -> View:
    """The hidden dimensions in a secret order, and the weights with them."""
    order = rng.permutation(hidden_dim)
    back = np.argsort(order)

    def permute(rows: Floats) -> Floats:
        return rows[..., order]

    return View(permute, lambda rows: rows[..., back], permute, _same)


def noisy(sigma: float, clip: float) -> Callable[[int, np.random.Generator], View]:
    """Embedded rows clipped to a length, with Gaussian noise: of another session each time."""

    def make(hidden_dim: int, rng: np.random.Generator) -> View:
        def disturb(rows: Floats) -> Floats:
            noise = GaussianNoise(sigma, clip, hidden_dim, rng.bytes(KEY_BYTES))
            return noise.apply(rows, [(0, 0, len(rows))])

        return View(_same, _same, _same, disturb)

    return make
