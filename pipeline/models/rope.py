"""Rotary positions: the angles of each position, computed once."""

import math

import torch

from pipeline.models.config import LlamaConfig, RopeScaling

# Positions computed at a time; always as many, since torch's cosine may round the odd end of an
# array differently from its middle.
TABLE_STEP = 256


class RopeTable:
    """(cos, signed sin) of every position, [positions, head_dim], grown as they are asked for."""

    def __init__(self, frequencies: torch.Tensor) -> None:
        self._frequencies = frequencies
        self._cos = torch.empty(0, 2 * len(frequencies))
        self._sin = torch.empty(0, 2 * len(frequencies))

    def rows(self, positions: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of each position, all below `end`: [rows, head_dim]."""
        while len(self._cos) < end:
            self._grow()
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _grow(self) -> None:
        first = len(self._cos)
        positions = torch.arange(first, first + TABLE_STEP, dtype=torch.float32)
        angles = torch.outer(positions, self._frequencies)
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat((self._cos, torch.cat((cos, cos), -1)))
        self._sin = torch.cat((self._sin, torch.cat((-sin, sin), -1)))


def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths stretched by `factor`, short ones kept, a ramp between (Llama 3.1)."""
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    ramp = (context / wavelengths - low) / (high - low)
    blended = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < context / high, frequencies, scaled)
