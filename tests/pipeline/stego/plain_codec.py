"""The simplest codec there is: the bytes, and random ones behind them, as a point on a line.

It works on fractions without end, so it is slow, and exact.
"""

import secrets
from fractions import Fraction

import numpy as np

from pipeline.stego.errors import StegoError
from pipeline.stego.token_weights import TokenWeights


class PlainReader:
    def __init__(self, num_bytes, key):
        self._num_cells = 1 << (8 * num_bytes)
        self._num_bytes = num_bytes
        self.low, self.width = Fraction(0), Fraction(1)

    def _cell(self):
        first = self.low * self._num_cells // 1
        last = -(-(self.low + self.width) * self._num_cells // 1) - 1
        return first, last

    @property
    def is_certain(self):
        first, last = self._cell()
        return first == last

    @property
    def num_bits(self):
        return min(8 * self._num_bytes, max(0, -_log2(self.width)))

    def observe(self, weights, index):
        if self.is_certain:
            return
        if not 0 <= index < len(weights.ids):
            raise StegoError("no such token")
        before = int(weights.weights[:index].sum())
        self.low += self.width * Fraction(before, weights.total)
        self.width *= Fraction(int(weights.weights[index]), weights.total)

    def payload(self):
        if not self.is_certain:
            raise StegoError("not certain yet")
        return self._cell()[0].to_bytes(self._num_bytes, "big")


class PlainWriter(PlainReader):
    def __init__(self, payload, key):
        super().__init__(len(payload), key)
        tail = secrets.token_bytes(64)
        self._point = Fraction(
            int.from_bytes(payload + tail, "big"), 1 << (8 * (len(payload) + 64))
        )

    def choose(self, weights):
        place = (self._point - self.low) / self.width * weights.total // 1
        ends = np.cumsum(weights.weights)
        index = int(np.searchsorted(ends, np.uint64(place), side="right"))
        self.observe(weights, index)
        return index


def _log2(fraction):
    return fraction.numerator.bit_length() - fraction.denominator.bit_length()


class PlainCodec:
    name = "plain"

    def writer(self, payload, key):
        return PlainWriter(payload, key)

    def reader(self, num_bytes, key):
        return PlainReader(num_bytes, key)


def random_weights(rng, num_tokens=50, vocab_size=1000, sharpness=1.0):
    """A distribution as a model might give it."""
    ids = np.sort(rng.choice(vocab_size, num_tokens, replace=False)).astype(np.int64)
    chances = np.exp(sharpness * rng.normal(size=num_tokens))
    weights = np.maximum(1, chances / chances.sum() * 2**40).astype(np.uint64)
    return TokenWeights(ids, weights, int(weights.sum()))
