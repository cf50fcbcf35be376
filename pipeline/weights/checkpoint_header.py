"""The headers of safetensors files, which nobody has vouched for when they are read.

The format's source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pipeline.dtypes import STORED_DTYPES, ArrayDType
from pipeline.errors import ModelError
from transport.frozen import frozen

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_RANK = 8

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
# What of these is read.
RAW_DTYPES: Mapping[str, ArrayDType] = MappingProxyType(
    {
        **STORED_DTYPES,
        "U8": np.dtype(np.uint8),
        "I32": np.dtype(np.int32),
        "I64": np.dtype(np.int64),
    }
)
# Sizes and offsets beyond any file; without a bound their product could take for ever.
MAX_SIZE = 1 << 63


@frozen
class StoredTensor:
    """One entry of a file's header; `start` and `end` count from the end of the header.

    `pair_rows`: so many rows are a head whose rotary pairs lie side by side, not half a head apart.
    `added`: to all its values. What is read of it has neither.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    pair_rows: int = 0
    added: float = 0.0


def as_rows(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which a tensor comes: a stack of matrices as the rows of all of them."""
    return (shape[0] * shape[1], math.prod(shape[2:])) if len(shape) > 2 else tuple(shape)


@frozen
class Header:
    """A file's tensors in the order of their bytes; `raw` is all that comes before the first."""

    raw: bytes
    tensors: tuple[StoredTensor, ...]


def read_header(file: FileIO, path: Path) -> Header:
    """Parse and check the header of the safetensors `file`, which stands at its start.

    Raises ModelError unless the tensors fill the file exactly, without gap or overlap.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = _read_exactly(file, min(8, file_bytes))
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8:
        raise ModelError(f"{path} is truncated: {file_bytes} bytes: fetch it again")
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{path} is corrupt: a header of {length} bytes: fetch it again")
    if length > file_bytes - 8:
        raise ModelError(
            f"{path} is truncated or corrupt: a header of {length} bytes in a file of "
            f"{file_bytes}: fetch it again"
        )
    raw = _read_exactly(file, length)
    try:
        tensors = parse_header_untrusted(raw)
    except CorruptHeader as error:
        raise ModelError(f"{path} is corrupt: {error}: fetch it again") from error
    promised = 8 + length + (tensors[-1].end if tensors else 0)
    if file_bytes != promised:
        what = "truncated" if file_bytes < promised else "too long"
        raise ModelError(
            f"{path} is {what}: {file_bytes} bytes, its header promises {promised}: fetch it again"
        )
    return Header(prefix + raw, tensors)


class CorruptHeader(Exception):
    """Why a header cannot be trusted; always translated to ModelError with the file's name."""


def parse_header_untrusted(raw: bytes) -> tuple[StoredTensor, ...]:
    """The tensors a header's JSON describes, in the order of their bytes. Raises CorruptHeader."""
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptHeader(f"its header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise CorruptHeader("its header is not an object")
    entries.pop("__metadata__", None)
    tensors = sorted(
        (_stored_tensor(name, entry) for name, entry in entries.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    position = 0
    for tensor in tensors:
        if tensor.start != position:
            raise CorruptHeader(
                f"tensor {tensor.name} starts at {tensor.start}, the one before ends at {position}"
            )
        position = tensor.end
    return tuple(tensors)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _stored_tensor(name: str, entry: object) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptHeader(f"tensor {name} is described by {str(entry)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CorruptHeader(f"tensor {name} has the unknown dtype {str(dtype)[:20]!r}")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise CorruptHeader(f"tensor {name} has the shape {str(shape)[:80]}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CorruptHeader(f"tensor {name} has the offsets {str(offsets)[:80]}")
    start, end = offsets
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != num_bytes:
        raise CorruptHeader(
            f"tensor {name} is {dtype} {shape}, {num_bytes} bytes, but spans {end - start}"
        )
    return StoredTensor(name, dtype, tuple(shape), start, end)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(each) is int and 0 <= each < MAX_SIZE for each in value
    )


def open_file(path: Path) -> FileIO:
    """A file to be read without buffers. Raises ModelError."""
    try:
        return FileIO(path, "r")
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _read_exactly(file: FileIO, num_bytes: int) -> bytes:
    buffer = bytearray(num_bytes)
    fill(file, Path(str(file.name)), memoryview(buffer))
    return bytes(buffer)


def fill(file: FileIO, path: Path, block: memoryview) -> None:
    """Read just that many bytes. Raises ModelError."""
    position = 0
    while position < len(block):
        count = read_into(file, path, block[position:])
        if not count:
            raise ModelError(f"{path} was truncated while it was read: fetch it again")
        position += count


def read_into(file: FileIO, path: Path, block: memoryview) -> int:
    """Read as many bytes as come at once, at the file's end none. Raises ModelError."""
    try:
        return file.readinto(block)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
