"""What a mode's server holds instead of the model's rows, and what the next layers make of it.

A view is a few functions of rows [tokens, hidden]. Its randomness is handed in: a secret is drawn
once for all sessions, noise anew for each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.codecs.rotated_int8 import INT8_MAX
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


def rotated(hidden_dim: int, rng: np.random.Generator) -> View:
    """Rows by a secret orthogonal matrix, and the weights with them."""
    matrix = random_orthogonal(hidden_dim, rng)

    def rotate(rows: Floats) -> Floats:
        return rows @ matrix.T

    return View(rotate, lambda rows: rows @ matrix, rotate, _same)


def rotated_int8(hidden_dim: int, rng: np.random.Generator) -> View:
    """The same, rounded to int8 with a scale for each row where rows travel."""
    exact = rotated(hidden_dim, rng)
    return View(
        lambda rows: rounded_to_int8(exact.observe(rows)), exact.restore, exact.readers, _same
    )


def noisy(sigma: float, clip: float) -> Callable[[int, np.random.Generator], View]:
    """Embedded rows clipped to a length, with Gaussian noise in each of their dimensions."""

    def make(hidden_dim: int, rng: np.random.Generator) -> View:
        del hidden_dim

        def disturb(rows: Floats) -> Floats:
            lengths = np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
            clipped = rows * np.minimum(1, clip / lengths)
            noise = sigma * rng.standard_normal(rows.shape, np.float32)
            noisy_rows: Floats = (clipped + noise).astype(np.float32)
            return noisy_rows

        return View(_same, _same, _same, disturb)

    return make


def random_orthogonal(size: int, rng: np.random.Generator) -> Floats:
    """Uniform over all orthogonal matrices of that size."""
    matrix, upper = np.linalg.qr(rng.standard_normal((size, size)))
    return (matrix * np.sign(np.diag(upper))).astype(np.float32)


def rounded_to_int8(rows: Floats) -> Floats:
    """Each row to the nearest multiples of a 127th of its greatest magnitude."""
    scales = np.abs(rows).max(axis=-1, keepdims=True) / INT8_MAX
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    rounded: Floats = np.rint(rows / scales) * scales
    return rounded
