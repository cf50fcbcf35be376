"""Rotary positions: the angles of each position, computed once."""

import math

import torch

from pipeline.models.config import LlamaConfig, RopeScaling
from pipeline.models.kernels import Kernels

# Positions computed at a time; always as many, since torch's cosine may round the odd end of an
# array differently from its middle.
TABLE_STEP = 256


class RopeTable:
    """(cos, signed sin) of every position, [positions, head_dim], grown as they are asked for."""

    def __init__(self, frequencies: torch.Tensor, kernels: Kernels, num_positions: int) -> None:
        """On another device than the CPU a table of `num_positions` that stays where it is."""
        device = kernels.device
        self._frequencies = frequencies
        self._kernels = kernels
        self._cos = torch.empty(0, 2 * len(frequencies), device=device)
        self._sin = torch.empty(0, 2 * len(frequencies), device=device)
        if device.type != "cpu":
            self._grow_to(num_positions)

    def rows(self, positions: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of each position, all below `end`: [rows, head_dim]."""
        self._grow_to(end)
        cos, sin = (self._cos.new_empty(len(positions), self._cos.shape[1]) for _ in range(2))
        self._kernels.lookup(self._cos, positions, cos)
        self._kernels.lookup(self._sin, positions, sin)
        return cos, sin

    def _grow_to(self, end: int) -> None:
        cosines, sines = [self._cos], [self._sin]
        for first in range(len(self._cos), end, TABLE_STEP):
            positions = torch.arange(first, first + TABLE_STEP, dtype=torch.float32, device="cpu")
            angles = torch.outer(positions, self._frequencies)  # alike on every device
            cos, sin = angles.cos(), angles.sin()
            cosines.append(torch.cat((cos, cos), -1).to(self._cos.device))
            sines.append(torch.cat((-sin, sin), -1).to(self._sin.device))
        if len(cosines) > 1:
            self._cos, self._sin = torch.cat(cosines), torch.cat(sines)


def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2]."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu")
    exponents = pairs.float() / config.head_dim
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
