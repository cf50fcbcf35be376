"""torch's tensors as the arrays that are encoded, and back."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, ArrayDType, HostArray

DTYPES: dict[torch.dtype, ArrayDType] = {
    torch.float32: FLOAT32,
    torch.float64: np.dtype(np.float64),
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
}


def array_dtype(tensor: torch.Tensor) -> ArrayDType:
    """The type of number of the array with the same bits."""
    return DTYPES[tensor.dtype]


def numbers(tensor: torch.Tensor) -> HostArray:
    """The same numbers in float32, or in float64 where they are of that."""
    real = tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
    array: HostArray = real.cpu().numpy()
    return array


def bits(tensor: torch.Tensor) -> HostArray:
    """The same bits; of bfloat16 as numbers of 16 bits (see pipeline.dtypes)."""
    plain = tensor.detach().cpu()
    if plain.dtype == torch.bfloat16:
        return plain.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    array: HostArray = plain.numpy()
    return array


def stacked(rows: Sequence[HostArray], like: torch.Tensor) -> torch.Tensor:
    """Arrays [heads, rows, width] as one tensor; shorter ones begin with rows of zeros."""
    heads, _, width = rows[0].shape
    longest = max(each.shape[1] for each in rows)
    together = np.zeros((len(rows), heads, longest, width), rows[0].dtype)
    for at, each in enumerate(rows):
        together[at, :, longest - each.shape[1] :] = each
    if like.dtype == torch.bfloat16:
        return torch.from_numpy(together.view(np.int16)).view(torch.bfloat16).to(like.device)
    return torch.from_numpy(together).to(like.device)
