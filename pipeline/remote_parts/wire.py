"""Questions and answers as they travel: a header, whose meaning is the mode's own, and tensors.

An answer's first byte says whether it is one; if not, the rest is why, as text.
"""

import numpy as np

from pipeline.dtypes import HostArray
from transport.tensor_frames import DType, Frame, FrameKind, Tensor, TensorSpec

Message = tuple[bytes, tuple[Tensor, ...]]

MAX_REFUSAL_BYTES = 1024
_DONE, _REFUSED = b"\0", b"\1"
_ARRAY_DTYPES: dict[DType, np.dtype[np.generic]] = {
    DType.F32: np.dtype("<f4"),
    DType.F64: np.dtype("<f8"),
    DType.U32: np.dtype("<u4"),
    DType.I64: np.dtype("<i8"),
    DType.U64: np.dtype("<u8"),
}
_WIRE_DTYPES = {dtype: name for name, dtype in _ARRAY_DTYPES.items()}


class PartRefusal(Exception):
    """A handler will not do what it is asked; the text goes to whoever asked."""


def answer_frame(header: bytes, tensors: tuple[Tensor, ...]) -> Frame:
    """An answer."""
    return Frame(FrameKind.DATA, _DONE + header, tensors)


def refusal_frame(reason: str) -> Frame:
    """Why there is none."""
    return Frame(FrameKind.DATA, _REFUSED + reason.encode()[:MAX_REFUSAL_BYTES])


def read_answer_untrusted(frame: Frame) -> Message:
    """Header and tensors of an answer. Raises PartRefusal for a refusal, and for neither."""
    status, header = frame.header[:1], frame.header[1:]
    if status == _DONE:
        return header, frame.tensors
    if status != _REFUSED:
        raise PartRefusal("it answered with what is no answer")
    text = header[:MAX_REFUSAL_BYTES].decode("utf-8", "replace")
    raise PartRefusal("".join(each if each.isprintable() else "?" for each in text))


def to_tensor(array: HostArray) -> Tensor:
    """An array of one of the kinds above, as it travels; contiguous ones are not copied."""
    name = _WIRE_DTYPES.get(array.dtype)
    if name is None:
        name = _WIRE_DTYPES[array.dtype.newbyteorder("<")]
    plain = np.ascontiguousarray(array, _ARRAY_DTYPES[name])
    spec = TensorSpec(name, plain.shape)
    return Tensor(spec, memoryview(plain.reshape(-1).view(np.uint8).data))


def to_array(tensor: Tensor) -> HostArray:
    """A view of a tensor's memory. Raises PartRefusal for other kinds of elements."""
    dtype = _ARRAY_DTYPES.get(tensor.spec.dtype)
    if dtype is None:
        raise PartRefusal(f"tensors of {tensor.spec.dtype.name} are not exchanged")
    return np.frombuffer(tensor.data, dtype).reshape(tensor.spec.shape)
