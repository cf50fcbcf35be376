"""Questions for products as they travel: which linear, and rows of Z_2^64; rows come back."""

import struct

import numpy as np

from pipeline.offload.ring import Words
from pipeline.remote_parts.wire import PartRefusal, to_array, to_tensor
from transport.tensor_frames import FrameLimits, Tensor

_INDEX = struct.Struct("<I")
# Of rows one way: more of them are asked for piece by piece, so that neither side holds much.
MAX_BYTES = 16 << 20
# A header that says no more than an index, or why a question is refused.
LIMITS = FrameLimits(max_header_bytes=2048, max_tensors=1, max_tensor_bytes=MAX_BYTES)


def rows_a_question(num_in: int, num_out: int) -> int:
    """How many rows go and come at once."""
    return max(1, MAX_BYTES // (8 * max(num_in, num_out)))


def question(index: int, rows: Words) -> tuple[bytes, tuple[Tensor, ...]]:
    """Rows to be multiplied by the weights of a linear, by its index."""
    return _INDEX.pack(index), (to_tensor(rows),)


def question_untrusted(header: bytes, tensors: tuple[Tensor, ...]) -> tuple[int, Words]:
    """Which linear, and rows [rows, in]. Raises PartRefusal for what asks for no product."""
    if len(header) != _INDEX.size:
        raise PartRefusal("a question names one linear")
    (index,) = _INDEX.unpack(header)
    return index, rows_untrusted(tensors)


def rows_untrusted(tensors: tuple[Tensor, ...]) -> Words:
    """The rows of a question or an answer. Raises PartRefusal for anything else."""
    arrays = [to_array(each) for each in tensors]
    if len(arrays) != 1 or arrays[0].dtype != np.dtype("<u8") or arrays[0].ndim != 2:
        raise PartRefusal("rows of 64-bit words are exchanged, and nothing else")
    return arrays[0].astype(np.uint64, copy=False)
