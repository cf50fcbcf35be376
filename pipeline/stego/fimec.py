"""Bytes carried by factored iterative minimum-entropy coupling (FIMEC, arXiv 2405.19540).

Who reads keeps a distribution over the values that the bytes can still have, as independent
factors, at first one uniform factor for each block of bits. At each token the most uncertain factor
is coupled with the token's distribution; the token is drawn from the coupling given the factor's
true value, so it falls by its own weight, and the factor becomes what the coupling says given the
token. Beyond the published scheme, small factors are joined before they are coupled as long as the
product is no larger than a block: what many nearly known blocks still lack would else take a token
each, a fifth of all.

All is whole numbers, or one division of two, which is rounded correctly: both ends stay the same on
any machine. So uncertainty is min-entropy, the likeliest value's share; a sum of logarithms may
differ in its last bit. A value is excluded only where a coupling leaves it nothing at all, which
cannot happen to the true one, and the bytes are certain once each factor has a single value.
Masses are rounded to 2**-61; a token's chance is off by no more than that times a factor's values.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from random import Random, SystemRandom

import numpy as np

from pipeline.stego.coupling import greedy_coupling
from pipeline.stego.errors import StegoError
from pipeline.stego.rotation import Rotation
from pipeline.stego.token_weights import TokenWeights

_SUM_BITS = 62  # of the masses that are coupled; an int64 holds them
DEFAULT_BLOCK_BITS = 8
# A step takes five milliseconds with 12, and a hundred with 16: too long for whoever waits beside.
_MAX_BLOCK_BITS = 12

Entry = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Factor:
    """How likely each value is that some of the number's bits can have; the other bits are 0."""

    mask: int
    values: Sequence[int]
    masses: Sequence[int]
    greatest_share: float

    def joined(self, other: "_Factor") -> "_Factor":
        return _Factor(
            self.mask | other.mask,
            [one | two for one in self.values for two in other.values],
            [one * two for one in self.masses for two in other.masses],
            self.greatest_share * other.greatest_share,
        )

    def scaled(self, total: int) -> "_Factor":
        """The same with masses of another sum, each at least 1."""
        present = sum(self.masses)
        masses = [mass * total // present or 1 for mass in self.masses]
        masses[masses.index(max(masses))] += total - sum(masses)
        return replace(self, masses=masses)

    def given(self, column: list[Entry]) -> "_Factor":
        """What a token leaves whose entries of a coupling these are: (token, place, mass)."""
        masses = [mass for _, _, mass in column]
        values = [self.values[place] for _, place, _ in column]
        return _Factor(self.mask, values, masses, max(masses) / sum(masses))


class FimecReader:
    """The factors of what the number may be."""

    def __init__(self, num_bytes: int, key: bytes, block_bits: int) -> None:
        self._rotation = Rotation.of(key, num_bytes)
        self._num_payload_bits = 8 * num_bytes
        self._max_values = 1 << block_bits
        self._known = 0  # the bits that no factor has
        self._factors: list[_Factor] = []
        even = (1,) * self._max_values
        for shift in range(0, self._num_payload_bits, block_bits):
            end = min(shift + block_bits, self._num_payload_bits)
            values = range(0, 1 << end, 1 << shift)
            mask = (1 << end) - (1 << shift)
            self._factors.append(_Factor(mask, values, even[: len(values)], 1 / len(values)))

    @property
    def is_certain(self) -> bool:
        """Whether each factor has one value left."""
        return not self._factors

    @property
    def num_bits(self) -> float:
        """As `Reader.num_bits`, by what the likeliest values lack."""
        lacking = -sum(math.log2(factor.greatest_share) for factor in self._factors)
        return self._num_payload_bits - lacking

    def observe(self, weights: TokenWeights, index: int) -> None:
        """As `Reader.observe`."""
        if not self.is_certain:
            weights.bounds(index)
            factor = self._take(weights)
            self._learn(factor, _couple(weights, factor), weights, index)

    def payload(self) -> bytes:
        """As `Reader.payload`. Raises StegoError before they are certain."""
        if not self.is_certain:
            raise StegoError("the choices end before the bytes are certain")
        return self._rotation.undo(self._known)

    def _take(self, weights: TokenWeights) -> _Factor:
        """The most uncertain factor, joined with those after it that leave it small enough.

        Its masses are brought to the sum of the weights.
        """
        self._factors.sort(key=attrgetter("greatest_share"))
        taken, *others = self._factors
        self._factors = []
        for other in others:
            if len(taken.values) * len(other.values) <= self._max_values:
                taken = taken.joined(other)
            else:
                self._factors.append(other)
        return taken.scaled(weights.total << _scale(weights))

    def _learn(
        self, factor: _Factor, coupling: Iterator[Entry], weights: TokenWeights, index: int
    ) -> None:
        """Put back what a token leaves of a factor."""
        missing = int(weights.weights[index]) << _scale(weights)
        column = []
        while missing:
            entry = next(coupling)
            if entry[0] == index:
                column.append(entry)
                missing -= entry[2]
        left = factor.given(column)
        if len(left.values) > 1:
            self._factors.append(left)
        else:
            self._known |= left.values[0]


class FimecWriter(FimecReader):
    """Knows the number too."""

    def __init__(self, payload: bytes, key: bytes, block_bits: int, random: Random) -> None:
        super().__init__(len(payload), key, block_bits)
        self._random = random
        self._number = self._rotation.apply(payload)

    def choose(self, weights: TokenWeights) -> int:
        """As `Writer.choose`."""
        if self.is_certain:
            return weights.index_at(self._random.randrange(weights.total))
        factor = self._take(weights)
        coupling, seen = _couple(weights, factor), []
        place = factor.values.index(self._number & factor.mask)
        point = self._random.randrange(factor.masses[place])
        while point >= 0:
            entry = next(coupling)
            seen.append(entry)
            if entry[1] == place:
                point -= entry[2]
        index = seen[-1][0]
        self._learn(factor, chain(seen, coupling), weights, index)
        return index


class FimecCodec:
    """Carries bits by minimum-entropy coupling; larger blocks carry more of them and cost more.

    Takes block_bits, 1 to 12. Raises StegoError for another.
    """

    name = "fimec"

    def __init__(
        self, random: Random | None = None, *, block_bits: int = DEFAULT_BLOCK_BITS
    ) -> None:
        if not 1 <= block_bits <= _MAX_BLOCK_BITS:
            raise StegoError(f"block_bits is {block_bits}; give 1 to {_MAX_BLOCK_BITS}")
        self._random = random or SystemRandom()
        self._block_bits = block_bits

    def writer(self, payload: bytes, key: bytes) -> FimecWriter:
        """As `StegoCodec.writer`."""
        return FimecWriter(payload, key, self._block_bits, self._random)

    def reader(self, num_bytes: int, key: bytes) -> FimecReader:
        """As `StegoCodec.reader`."""
        return FimecReader(num_bytes, key, self._block_bits)


def _scale(weights: TokenWeights) -> int:
    """The power of two that brings a sum of weights to as many bits as masses have."""
    return _SUM_BITS - weights.total.bit_length()


def _couple(weights: TokenWeights, factor: _Factor) -> Iterator[Entry]:
    """The coupling of tokens and a factor's values of the same sum: (token, place, mass)."""
    negated = -(weights.weights << np.uint64(_scale(weights))).astype(np.int64)
    order = np.argsort(negated, kind="stable")
    rows = zip(negated[order].tolist(), order.tolist(), strict=True)
    return greedy_coupling(rows, [(-mass, place) for place, mass in enumerate(factor.masses)])
