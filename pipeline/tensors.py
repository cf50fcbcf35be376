"""Between torch tensors and the bytes of a tensor frame, without copying."""

import torch

from pipeline.errors import MessageError
from transport.frames import DType, Tensor, TensorSpec

_TO_TORCH = {
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
}
_FROM_TORCH = {dtype: code for code, dtype in _TO_TORCH.items()}


def activation_to_wire(hidden: torch.Tensor, dtype: DType) -> Tensor:
    """View [tokens, hidden] of host memory as frame bytes, converted to `dtype` if need be."""
    converted = hidden.to(_TO_TORCH[dtype]).contiguous()
    spec = TensorSpec(dtype, tuple(converted.shape))
    if dtype is DType.BF16:  # numpy has no such type
        converted = converted.view(torch.int16)
    return Tensor(spec, converted.numpy().data.cast("B"))


def activation_from_wire(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View frame bytes as [tokens, hidden]; valid as long as the frame's storage is."""
    wire_dtype = _TO_TORCH.get(tensor.spec.dtype)
    if wire_dtype is None:
        raise MessageError(f"activations arrived as {tensor.spec.dtype.name}")
    flat = torch.frombuffer(tensor.data, dtype=wire_dtype)
    return flat.view(tensor.spec.shape).to(dtype)
