"""Bytes carried by range coding: a number picks each token by the part of a range it lies in.

The bytes, turned by a `Rotation`, and endless random digits behind them are one number's digits,
which a range decoder turns into tokens. The number is uniform, so each token falls exactly by its
weight, given all before it, and so it stays behind the last byte, where digits never end.

The published scheme (rotation range coding, arXiv 2604.08052) has no digits behind the bytes and
rotates anew at each step, for what is left of its range gets too coarse for a distribution: with a
secret key the rotation makes up for that. Under a key that everybody knows it could not, and its
last tokens would give it away; a header that is read before there is a key is carried here as well
as any other uniform bytes.
"""

import math
from random import Random, SystemRandom

from pipeline.stego.errors import StegoError
from pipeline.stego.rotation import Rotation
from pipeline.stego.token_weights import TokenWeights

_MIN_WIDTH_BITS = 128  # a token's chance is off by less than 2**-128


class RangeReader:
    """The range in which the rotated number is known to lie."""

    def __init__(self, num_bytes: int, key: bytes) -> None:
        self._rotation = Rotation.of(key, num_bytes)
        self._num_payload_bits = 8 * num_bytes
        self._low, self._width = 0, 1 << self._num_payload_bits
        self._fraction_bits = 0  # how many of the digits lie behind the bytes

    @property
    def is_certain(self) -> bool:
        """Whether the range has come to lie between two neighbouring values of the bytes."""
        highest = self._low + self._width - 1
        return self._low >> self._fraction_bits == highest >> self._fraction_bits

    @property
    def num_bits(self) -> float:
        """As `Reader.num_bits`."""
        if self.is_certain:
            return self._num_payload_bits
        known = self._num_payload_bits + self._fraction_bits - math.log2(self._width)
        return min(known, self._num_payload_bits)

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
        return self._rotation.undo(self._low >> self._fraction_bits)

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
        self._offset = self._rotation.apply(payload)

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
        """As `StegoCodec.writer`."""
        return RangeWriter(payload, key, self._random)

    def reader(self, num_bytes: int, key: bytes) -> RangeReader:
        """As `StegoCodec.reader`."""
        return RangeReader(num_bytes, key)
