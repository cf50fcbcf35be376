"""Names of number formats, as config.json, manifests and flags spell them, and torch's own."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from pipeline.errors import ModelError

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int8": torch.int8,
    }
)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`; raises ModelError listing the names there are."""
    try:
        return TORCH_DTYPES[name]
    except KeyError:
        known = ", ".join(TORCH_DTYPES)
        raise ModelError(f"unknown dtype {name!r}: use one of {known}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """The name of `dtype`, the inverse of `torch_dtype`."""
    return str(dtype).removeprefix("torch.")
