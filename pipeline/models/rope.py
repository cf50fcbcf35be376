"""Rotary positions: the angles of each position, computed once."""

import math

import numpy as np

from pipeline.dtypes import FLOAT32, Array, Floats
from pipeline.kernels.base import Kernels
from pipeline.models.config import LlamaConfig
from pipeline.models.rope_config import RopeScaling

TABLE_STEP = 256  # positions computed at a time


class RopeTable:
    """(cos, signed sin) of every position, [positions, head_dim], grown as they are asked for."""

    def __init__(self, frequencies: Floats, kernels: Kernels, num_positions: int) -> None:
        """On another device than the CPU a table of `num_positions` that stays where it is."""
        self._frequencies = frequencies
        self._kernels = kernels
        self._host = [np.empty((0, 2 * len(frequencies)), FLOAT32) for _ in range(2)]
        self._tables: list[Array] = []
        self._grow_to(1 if kernels.is_host else num_positions)

    def rows(self, positions: Array, end: int) -> tuple[Array, Array]:
        """(cos, sin) of each position, all below `end`: [rows, head_dim]."""
        self._grow_to(end)
        kernels, (cos_table, sin_table) = self._kernels, self._tables
        cos, sin = (kernels.empty(len(positions), cos_table.shape[1]) for _ in range(2))
        kernels.lookup(cos_table, positions, cos)
        kernels.lookup(sin_table, positions, sin)
        return cos, sin

    def _grow_to(self, end: int) -> None:
        tables = [[table] for table in self._host]
        for first in range(len(self._host[0]), end, TABLE_STEP):
            for table, rows in zip(tables, self._step(first), strict=True):
                table.append(rows)
        if len(tables[0]) > 1:
            self._host = [np.concatenate(table) for table in tables]
            self._tables = [self._kernels.to_device(table) for table in self._host]

    def _step(self, first: int) -> tuple[Floats, Floats]:
        """TABLE_STEP positions' cosines and signed sines.

        An angle is rounded to float32, as models are trained with; nothing else is before the end,
        so that the numbers are the same on every machine.
        """
        positions = np.arange(first, first + TABLE_STEP, dtype=FLOAT32)
        angles = np.outer(positions, self._frequencies).astype(np.float64)
        cos, sin = np.cos(angles).astype(FLOAT32), np.sin(angles).astype(FLOAT32)
        return np.hstack((cos, cos)), np.hstack((-sin, sin))


def rope_frequencies(config: LlamaConfig) -> Floats:
    """Radians per position of each pair of dimensions, [head_dim / 2]."""
    exponents = np.arange(0, config.head_dim, 2, dtype=FLOAT32) / np.float32(config.head_dim)
    wavelengths = np.power(config.rope_theta, exponents.astype(np.float64)).astype(FLOAT32)
    frequencies: Floats = np.reciprocal(wavelengths)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: Floats, scaling: RopeScaling) -> Floats:
    """Long wavelengths stretched by `factor`, short ones kept, a ramp between (Llama 3.1)."""
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    ramp = (context / wavelengths - low) / (high - low)
    blended = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / scaling.factor, blended)
    return np.where(wavelengths < context / high, frequencies, scaled).astype(FLOAT32)
