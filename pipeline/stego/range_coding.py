"""Bytes carried by range coding: a number picks each token by the part of a range it lies in.

The bytes and endless random digits behind them are a number's digits; the number, turned round the
circle of all numbers by an amount drawn from the key, is decoded into tokens as a range coder
decodes. So each token falls exactly by its weight, as the number is uniform twice over:

- With a secret key the rotation makes it so, whatever the bytes. The published scheme (rotation
  range coding, arXiv 2604.08052) rotates anew at each step, as its number has an end and what is
  left of the range would be too coarse for a distribution. Ours has no end: one rotation by as
  many digits as the bytes have leaves nothing to be rotated at later steps.
- With a key that everybody knows, uniform bytes make it so. A header that is read before there is
  a key can be carried so; with the published scheme's end it could not, for its last tokens would
  follow the publicly known rotation instead of their weights.
"""

import hashlib
import math
from random import Random, SystemRandom

from pipeline.stego.errors import StegoError
from pipeline.stego.token_weights import TokenWeights

_MIN_WIDTH_BITS = 128  # a token's chance is off by less than 2**-128
_ROTATION = b"veilpipe range coding: rotation\0"


class RangeReader:
    """The range in which the rotated number is known to lie."""

    def __init__(self, num_bytes: int, key: bytes) -> None:
        self._num_bytes = num_bytes
        self._rotation = int.from_bytes(hashlib.shake_256(_ROTATION + key).digest(num_bytes))
        self._low, self._width = 0, 1 << 8 * num_bytes
        self._fraction_bits = 0  # how many of the digits lie behind the bytes

    @property
    def is_certain(self) -> bool:
        """Whether the range has come to lie between two neighbouring values of the bytes."""
        highest = self._low + self._width - 1
        return self._low >> self._fraction_bits == highest >> self._fraction_bits

    @property
    def num_bits(self) -> float:
        """As `Reader.num_bits`."""
        all_bits = 8 * self._num_bytes
        known = all_bits + self._fraction_bits - math.log2(self._width)
        return all_bits if self.is_certain else min(known, all_bits)

    def observe(self, weights: TokenWeights, index: int) -> None:
        """As `Reader.observe`."""
        if not self.is_certain:
            bounds = weights.bounds(index)
            self._refine()
            self._narrow(bounds, weights.total)

    def payload(self) -> bytes:
        """As `Reader.payload`. Raises StegoError before they are certain."""
        if not self.is_certain:
            raise StegoError("the choices end before the bytes are certain")
        rotated = self._low >> self._fraction_bits
        return ((rotated - self._rotation) % (1 << 8 * self._num_bytes)).to_bytes(self._num_bytes)

    def _refine(self) -> int:
        """Count in smaller units where the range has become coarse; how many digits that adds."""
        added = max(_MIN_WIDTH_BITS + 1 - self._width.bit_length(), 0)
        self._low <<= added
        self._width <<= added
        self._fraction_bits += added
        return added

    def _narrow(self, bounds: tuple[int, int], total: int) -> int:
        """Leave the part that belongs to a token; how far its start lies behind the old one."""
        start, end = (bound * self._width // total for bound in bounds)
        self._low += start
        self._width = end - start
        return start


class RangeWriter(RangeReader):
    """Knows the number too, as far behind the start of the range as `_offset` says."""

    def __init__(self, payload: bytes, key: bytes, random: Random) -> None:
        super().__init__(len(payload), key)
        self._random = random
        self._offset = (int.from_bytes(payload) + self._rotation) % self._width

    def choose(self, weights: TokenWeights) -> int:
        """As `Writer.choose`."""
        if self.is_certain:
            return weights.index_at(self._random.randrange(weights.total))
        added = self._refine()
        self._offset = self._offset << added | self._random.getrandbits(added)
        # the last whole number whose share of the range, rounded down as in _narrow, has begun
        point = ((self._offset + 1) * weights.total - 1) // self._width
        index = weights.index_at(point)
        self._offset -= self._narrow(weights.bounds(index), weights.total)
        return index


class RangeCodec:
    """Carries nearly as many bits as the tokens' entropy, in microseconds a token."""

    name = "range"

    def __init__(self, random: Random | None = None) -> None:
        self._random = random or SystemRandom()

    def writer(self, payload: bytes, key: bytes) -> RangeWriter:
        """As `StegoCodec.writer`; the bytes need not be uniform if the key is secret."""
        return RangeWriter(payload, key, self._random)

    def reader(self, num_bytes: int, key: bytes) -> RangeReader:
        """As `StegoCodec.reader`."""
        return RangeReader(num_bytes, key)
