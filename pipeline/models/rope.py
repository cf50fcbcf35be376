"""Rotary positions: the angles of each position, computed once, when it is first reached."""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.dtypes import FLOAT32, Array, Floats
from pipeline.kernels.base import Kernels
from pipeline.kernels.huge_pages import reserve
from pipeline.models.rope_config import Linear, Llama3, Rope, Stretched, Yarn

TABLE_STEP = 256  # positions computed at a time
FAST, SLOW = 32.0, 1.0  # of YaRN, where a file says nothing


class RopeTable:
    """(cos, signed sin) of every position, [positions, num_dims].

    They stay where they are, as recorded steps read them there. Of a model for 131,072 positions
    they are 134 MB, so on the CPU memory is taken, and computed, as far as positions are reached.
    """

    def __init__(self, rope: Rope, kernels: Kernels, num_positions: int) -> None:
        self._frequencies = rope_frequencies(rope)
        self._amplitude = 1.0 if rope.scaling is None else rope.scaling.amplitude
        self._kernels = kernels
        num_rows = -(-num_positions // TABLE_STEP) * TABLE_STEP
        self._host = [reserve((num_rows, rope.num_dims), FLOAT32) for _ in range(2)]
        self._num_known = 0
        self.reach(1 if kernels.is_host else num_positions)
        self._tables = [kernels.to_device(table) for table in self._host]

    def reach(self, end: int) -> int:
        """Have those of all positions below `end`; how many there are."""
        for first in range(self._num_known, end, TABLE_STEP):
            for table, rows in zip(self._host, self._step(first), strict=True):
                table[first : first + TABLE_STEP] = rows
            self._num_known = first + TABLE_STEP
        return self._num_known

    def rows(self, positions: Array) -> tuple[Array, Array]:
        """(cos, sin) of each position, all of them reached before: [rows, num_dims]."""
        kernels, (cos_table, sin_table) = self._kernels, self._tables
        cos, sin = (kernels.empty(len(positions), cos_table.shape[1]) for _ in range(2))
        kernels.lookup(cos_table, positions, cos)
        kernels.lookup(sin_table, positions, sin)
        return cos, sin

    def _step(self, first: int) -> tuple[Floats, Floats]:
        """TABLE_STEP positions' cosines and signed sines.

        An angle is rounded to float32, as models are trained with; nothing else is before the end,
        so that the numbers are the same on every machine.
        """
        positions = np.arange(first, first + TABLE_STEP, dtype=FLOAT32)
        angles = np.outer(positions, self._frequencies).astype(np.float64)
        cos, sin = ((each(angles) * self._amplitude).astype(FLOAT32) for each in (np.cos, np.sin))
        return np.hstack((cos, cos)), np.hstack((-sin, sin))


class Angles:
    """Those of layers, by the different ways in which positions turn their heads (None: not)."""

    def __init__(
        self, ropes: Sequence[Rope | None], kernels: Kernels, head_dim: int, max_positions: int
    ) -> None:
        self._ropes = ropes
        self._kernels = kernels
        self._head_dim, self._max_positions = head_dim, max_positions
        self._tables: dict[Rope, RopeTable] = {}

    def prepare(self, num_positions: int) -> None:
        """Have the tables of sessions of so many positions."""
        for rope in self._ropes:
            if rope is not None:
                self._table(rope.within(num_positions))

    def reach(self, num_positions: int, end: int) -> int:
        """Have the angles of all positions of such a session below `end`; how many there are."""
        tables = (self._table(each.within(num_positions)) for each in self._ropes if each)
        return min((table.reach(end) for table in tables), default=num_positions)

    def rows(self, num_positions: int, positions: Array) -> list[tuple[Array, Array] | None]:
        """(cos, sin) for each way: of positions of such a session, all of them reached before."""
        found: dict[Rope | None, tuple[Array, Array] | None] = {None: None}
        for rope in self._ropes:
            if rope not in found and rope is not None:
                found[rope] = self._table(rope.within(num_positions)).rows(positions)
        return [found[rope] for rope in self._ropes]

    def frequencies(self, num_positions: int) -> Floats | None:
        """By how many radians a position turns queries and keys of all layers, [head_dim / 2].

        None where these differ, turn in part, or are told positions otherwise.
        """
        (rope, *others) = {*self._ropes} or {None}
        if others or rope is None or rope.num_dims != self._head_dim:
            return None
        return rope_frequencies(rope.within(num_positions))

    def _table(self, rope: Rope) -> RopeTable:
        if rope not in self._tables:
            self._tables[rope] = RopeTable(rope, self._kernels, self._max_positions)
        return self._tables[rope]


def rope_frequencies(rope: Rope) -> Floats:
    """Radians per position of each pair of dimensions, [num_dims / 2].

    Raises AssertionError for LongRope's, which is that of no session: see `Rope.within`.
    """
    exponents = np.arange(0, rope.num_dims, 2, dtype=FLOAT32) / np.float32(rope.num_dims)
    wavelengths = np.power(rope.theta, exponents.astype(np.float64)).astype(FLOAT32)
    frequencies: Floats = np.reciprocal(wavelengths)
    match rope.scaling:
        case None:
            return frequencies
        case Linear(factor=factor):
            return frequencies / np.float32(factor)
        case Stretched(factors=factors):
            stretched: Floats = np.reciprocal(np.asarray(factors, FLOAT32) * wavelengths)
            return stretched
        case Llama3() as scaling:
            return _llama3_frequencies(frequencies, scaling)
        case Yarn() as scaling:
            return _yarn_frequencies(frequencies, scaling, rope)
    raise AssertionError(rope)


def _llama3_frequencies(frequencies: Floats, scaling: Llama3) -> Floats:
    """Long wavelengths stretched by `factor`, short ones kept, a ramp between (Llama 3.1)."""
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    ramp = (context / wavelengths - low) / (high - low)
    blended = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / scaling.factor, blended)
    return np.where(wavelengths < context / high, frequencies, scaled).astype(FLOAT32)


def _yarn_frequencies(frequencies: Floats, scaling: Yarn, rope: Rope) -> Floats:
    """Those below a dimension kept, those above another stretched, a ramp between."""

    def dimension(num_turns: float) -> float:
        """Where a frequency turns so many times in the original context."""
        wavelength = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return rope.num_dims * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast or FAST), dimension(scaling.beta_slow or SLOW)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.num_dims - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(rope.num_dims // 2, dtype=FLOAT32) - low) / (high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    stretched = frequencies / np.float32(scaling.factor)
    return (stretched * (1 - kept) + frequencies * kept).astype(FLOAT32)
