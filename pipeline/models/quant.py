"""Weights in fewer bits: what a precision means, and how values come to it.

`torch.float32`, `torch.bfloat16` and `torch.int8` stand for the precisions. Only the matrices have
one (linear layers, embedding, head); norms, biases and learned positions stay in float32.

int8 is symmetric with one bfloat16 scale for each 32 inputs of an output.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from pipeline.dtypes import TORCH_DTYPES
from pipeline.errors import ModelError

PRECISIONS = ("float32", "bfloat16", "int8")
INT8_MAX = 127  # symmetric: -128 is never used
GROUP = 32  # inputs of an output that share a scale
SMALLEST_SCALE = 1e-30  # groups of smaller numbers are zeros; the inverse of a scale is finite
# In files, the scales of int8 tensor NAME are called NAME_scale.
SCALE_SUFFIX = "_scale"


def to_precision(name: str) -> torch.dtype:
    """The dtype that stands for a precision; raises ModelError listing those there are."""
    if name not in PRECISIONS:
        raise ModelError(f"dtype {name!r} is not supported: use {', '.join(PRECISIONS)}")
    return TORCH_DTYPES[name]


def num_groups(num_in: int) -> int:
    """Scales of one output; the last group may be a short one."""
    return -(-num_in // GROUP)


def quantise(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of weights [out, in]: [out, in] int8, [out, groups] bfloat16.

    Rounds halves to even and scales up, so that nothing is clipped and the same weights give the
    same bits everywhere; the native kernels' own packing of floats gives them too.
    """
    grouped = _grouped(outputs.float())
    wanted = grouped.abs().amax(dim=2) / INT8_MAX
    # The upper half of a float32 is a bfloat16: the least that is not below what is wanted.
    bits = (wanted.view(torch.int32) + 0xFFFF) & -0x10000
    scales = bits.view(torch.float32)
    scales.masked_fill_(scales < SMALLEST_SCALE, 0.0)
    inverses = torch.where(scales > 0, 1 / scales, 0.0)
    values = (grouped * inverses.unsqueeze(2)).round_().clamp_(-INT8_MAX, INT8_MAX)
    return _ungrouped(values.to(torch.int8), outputs.shape[1]), scales.to(torch.bfloat16)


def dequantise(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights that int8 `values` [out, in] and their scales mean: [out, in] float32, exact."""
    weights = _grouped(values.float()).mul_(scales.float().unsqueeze(2))
    return _ungrouped(weights, values.shape[1])


def _grouped(outputs: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [out, groups, GROUP], zeros at the end."""
    num_out, num_in = outputs.shape
    missing = num_groups(num_in) * GROUP - num_in
    padded = F.pad(outputs, (0, missing)) if missing else outputs.contiguous()
    return padded.view(num_out, -1, GROUP)


def _ungrouped(grouped: torch.Tensor, num_in: int) -> torch.Tensor:
    return grouped.flatten(1)[:, :num_in]
