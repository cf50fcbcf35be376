"""The head of a GGUF file: metadata and where each tensor lies. Nobody has vouched for it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from pipeline.gguf.block_types import ROW_TYPES
from transport.frozen import frozen

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the first had shorter lengths, and no published models are left of it
MAX_HEAD_BYTES = 1 << 29  # a vocabulary of a million long tokens is a tenth of it
MAX_RANK = 4  # ggml's own
MAX_SIZE = 1 << 62
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32
ARCHITECTURE_KEY, ALIGNMENT_KEY = "general.architecture", "general.alignment"

_STRING, _ARRAY = 8, 9
# Value type -> how struct spells it.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
# Tensor type -> its name, those that are read and those that are refused by it.
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
Scalar = int | float | bool | str


class CorruptGguf(Exception):
    """Why a file cannot be read; always translated to ModelError with the file's name."""


class MoreNeeded(Exception):
    """The head goes on behind the bytes that were given."""


@frozen
class GgufTensor:
    """A tensor's entry: its shape as numpy has it; `start` and `end` count from the file's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@frozen
class _Array:
    """Where an array's values lie; they are read when they are asked for."""

    kind: int
    count: int
    start: int


class Metadata:
    """The key-value part. All reading of it raises CorruptGguf."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._values: dict[str, Scalar | _Array] = {}

    def add(self, key: str, value: Scalar | _Array) -> None:
        """One more; keys are unique. Raises CorruptGguf."""
        if key in self._values:
            raise CorruptGguf(f"its key {key[:80]!r} appears twice")
        self._values[key] = value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str) -> str | None:
        """A string, if it is there."""
        value: str | None = self._scalar(key, str)
        return value

    def flag(self, key: str) -> bool | None:
        """A boolean, if it is there."""
        value: bool | None = self._scalar(key, bool)
        return value

    def number(self, key: str) -> float | None:
        """A finite number, if it is there. Raises CorruptGguf."""
        value: float | None = self._scalar(key, float, int)
        if value is not None and not math.isfinite(value):
            raise CorruptGguf(f"its {key} is {value}")
        return value

    def size(self, key: str) -> int | None:
        """A whole number of at least 0, if it is there. Raises CorruptGguf."""
        value: int | None = self._scalar(key, int)
        if value is not None and value < 0:
            raise CorruptGguf(f"its {key} is {value}")
        return value

    def is_array(self, key: str) -> bool:
        """Whether it is there, and an array."""
        return isinstance(self._values.get(key), _Array)

    def texts(self, key: str) -> list[str] | None:
        """An array of strings, if it is there."""
        array = self._array(key, (_STRING,))
        if array is None:
            return None
        at, found = array.start, []
        for _ in range(array.count):
            length = int.from_bytes(self._data[at : at + 8], "little")
            found.append(_text(self._data[at + 8 : at + 8 + length]))
            at += 8 + length
        return found

    def numbers(self, key: str) -> list[Any] | None:
        """An array of numbers, if it is there."""
        array = self._array(key, _SCALARS)
        if array is None:
            return None
        return list(
            struct.unpack_from(f"<{array.count}{_SCALARS[array.kind]}", self._data, array.start)
        )

    def _scalar(self, key: str, *kinds: type) -> Any:  # noqa: ANN401 - one of `kinds`
        value = self._values.get(key)
        if value is not None and type(value) not in kinds:
            raise CorruptGguf(f"its {key} is no {kinds[0].__name__}")
        return value

    def _array(self, key: str, kinds: Mapping[int, str] | tuple[int, ...]) -> _Array | None:
        value = self._values.get(key)
        if value is not None and not (isinstance(value, _Array) and value.kind in kinds):
            raise CorruptGguf(f"its {key} is no array of the kind that belongs there")
        return value


@frozen
class GgufHead:
    """What a file's head says: tensors in the order of their bytes; `num_bytes` up to the first."""

    metadata: Metadata
    tensors: tuple[GgufTensor, ...]
    num_bytes: int


def parse_head_untrusted(data: bytes, file_bytes: int) -> GgufHead:
    """The head of a file of `file_bytes`, whose first bytes are `data`.

    Raises CorruptGguf unless each tensor lies in the file, behind the one before; MoreNeeded where
    `data` ends too soon.
    """
    try:
        return _parse(_Cursor(data), file_bytes)
    except MoreNeeded:
        if len(data) >= min(file_bytes, MAX_HEAD_BYTES):
            raise CorruptGguf("it is truncated: its head goes on behind its end") from None
        raise


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def skip(self, num_bytes: int) -> int:
        """Step over that many bytes; where they start."""
        start = self.at
        if num_bytes > len(self.data) - start:
            raise MoreNeeded
        self.at = start + num_bytes
        return start

    def take(self, form: str) -> Any:  # noqa: ANN401 - of the form
        """One number."""
        start = self.skip(struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self.data, start)[0]

    def string(self) -> str:
        """A string with its length before it."""
        length = self.take("Q")
        start = self.skip(length)
        return _text(self.data[start : start + length])

    def value(self) -> Scalar | _Array:
        """A value with its type before it."""
        kind = self.take("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        return self.take(_scalar_form(kind))  # type: ignore[no-any-return]

    def _array(self) -> _Array:
        kind, count = self.take("I"), self.take("Q")
        array = _Array(kind, count, self.at)
        if kind != _STRING:
            self.skip(count * struct.calcsize("<" + _scalar_form(kind)))
            return array
        # By hand, as a vocabulary has some hundred thousand.
        data, at, end = self.data, self.at, len(self.data)
        for _ in range(count):
            at += 8 + int.from_bytes(data[at : at + 8], "little")
            if at > end:
                raise MoreNeeded
        self.at = at
        return array


def _parse(cursor: _Cursor, file_bytes: int) -> GgufHead:
    magic = cursor.data[:4]
    if magic != MAGIC:
        raise CorruptGguf(f"it starts with {magic!r}, so it is no GGUF file")
    cursor.skip(4)
    version = cursor.take("I")
    if version not in VERSIONS:
        raise CorruptGguf(
            f"it is GGUF of version {version}: {' and '.join(map(str, VERSIONS))} are read"
            + (", of little-endian numbers" if version >= 1 << 16 else "")
        )
    num_tensors, num_values = cursor.take("Q"), cursor.take("Q")
    if num_tensors >= MAX_SIZE:
        raise CorruptGguf(f"it has {num_tensors} tensors")
    metadata = Metadata(cursor.data)
    for _ in range(num_values):
        key = cursor.string()
        metadata.add(key, cursor.value())
    entries = list(islice(_entries(cursor), num_tensors))
    alignment = metadata.size(ALIGNMENT_KEY) or DEFAULT_ALIGNMENT
    if alignment > MAX_ALIGNMENT:
        raise CorruptGguf(f"its {ALIGNMENT_KEY} is {alignment}")
    begin = _aligned(cursor.at, alignment)
    tensors = sorted(
        (_placed(entry, begin) for entry in entries), key=lambda each: (each.start, each.end)
    )
    _check_places(tensors, begin, alignment, file_bytes)
    if tensors and begin > len(cursor.data):
        raise MoreNeeded
    return GgufHead(metadata, tuple(tensors), begin)


def _entries(cursor: _Cursor) -> Iterator[GgufTensor]:
    """Tensors as they are listed, from the start of the data."""
    while True:
        name = cursor.string()
        rank = cursor.take("I")
        if rank > MAX_RANK:
            raise CorruptGguf(f"tensor {shown(name)} has {rank} dimensions")
        shape = tuple(cursor.take("Q") for _ in range(rank))[::-1]
        kind, start = cursor.take("I"), cursor.take("Q")
        if max(shape, default=0) >= MAX_SIZE or start >= MAX_SIZE:
            raise CorruptGguf(f"tensor {shown(name)} has the shape {list(shape)} at {start}")
        dtype = _TYPES.get(kind, f"number {kind}")
        yield GgufTensor(name, dtype, shape, start, start + _num_bytes(name, dtype, shape))


def _num_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    if dtype not in ROW_TYPES:
        readable = ", ".join(ROW_TYPES)
        raise CorruptGguf(f"tensor {shown(name)} is of type {dtype}: {readable} are read")
    kind, num_in = ROW_TYPES[dtype], shape[-1] if shape else 1
    if num_in % kind.size:
        raise CorruptGguf(
            f"tensor {shown(name)} is {dtype} {list(shape)}: a row is no multiple of {kind.size}"
        )
    return math.prod(shape[:-1]) * kind.row_bytes(num_in)


def _placed(entry: GgufTensor, begin: int) -> GgufTensor:
    start, end = begin + entry.start, begin + entry.end
    return GgufTensor(entry.name, entry.dtype, entry.shape, start, end)


def _check_places(tensors: list[GgufTensor], begin: int, alignment: int, file_bytes: int) -> None:
    """Nothing overlaps, and nothing but what aligns lies between."""
    position, names = begin, set()
    for tensor in tensors:
        if tensor.name in names:
            raise CorruptGguf(f"tensor {shown(tensor.name)} appears twice")
        names.add(tensor.name)
        if tensor.start < position:
            raise CorruptGguf(
                f"tensor {shown(tensor.name)} starts at {tensor.start}, and the one before ends "
                f"at {position}: they overlap"
            )
        if tensor.start != _aligned(position, alignment):
            raise CorruptGguf(
                f"tensor {shown(tensor.name)} starts at {tensor.start}, and the one before ends "
                f"at {position}: there is a gap"
            )
        if tensor.end > file_bytes:
            raise CorruptGguf(
                f"it is truncated: tensor {shown(tensor.name)} ends at {tensor.end}, the file "
                f"at {file_bytes}"
            )
        position = tensor.end
    if tensors and file_bytes > _aligned(position, alignment):
        raise CorruptGguf(f"it is too long: {file_bytes} bytes, and its tensors end at {position}")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def shown(name: str) -> str:
    """A name in a message, which is one line whatever the file says."""
    return name[:80] if name.isprintable() else repr(name[:80])


def _scalar_form(kind: int) -> str:
    if kind not in _SCALARS:
        raise CorruptGguf(f"a value in its metadata is of the unknown type {kind}")
    return _SCALARS[kind]


def _text(raw: bytes) -> str:
    # Vocabularies of byte pairs are text by construction; what is not is nobody's token.
    return raw.decode("utf-8", "replace")
