"""Between arrays and the bytes of a tensor frame, copying only to convert."""

import numpy as np

from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Floats, from_floats, to_floats
from pipeline.errors import MessageError
from transport.frames import DType, Tensor, TensorSpec

_ARRAY_DTYPES = {DType.F32: FLOAT32, DType.F16: FLOAT16, DType.BF16: BFLOAT16}


def activation_to_wire(hidden: Floats, dtype: DType) -> Tensor:
    """View [tokens, hidden] as frame bytes, converted to `dtype` if need be."""
    converted = np.ascontiguousarray(from_floats(hidden, _ARRAY_DTYPES[dtype]))
    return Tensor(TensorSpec(dtype, hidden.shape), converted.data.cast("B"))


def activation_from_wire(tensor: Tensor) -> Floats:
    """View frame bytes as [tokens, hidden]; valid as long as the frame's storage is."""
    wire_dtype = _ARRAY_DTYPES.get(tensor.spec.dtype)
    if wire_dtype is None:
        raise MessageError(f"activations arrived as {tensor.spec.dtype.name}")
    return to_floats(np.frombuffer(tensor.data, wire_dtype).reshape(tensor.spec.shape))
