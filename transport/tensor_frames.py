"""Tensor frames and how they are laid out in records.

A frame's head (kind, tensor specs, opaque header) is one FRAME record. Where head and tensors fit
64 KiB together they share that record; otherwise each tensor follows in BODY records, decrypted
straight into the storage it is handed out from. Which of the two is decided by the sizes alone.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from math import prod
from struct import Struct
from struct import error as StructError  # noqa: N812  (an exception, named like one)
from typing import NamedTuple

from transport.errors import FrameError, MisuseError
from transport.frozen import frozen

INLINE_BYTES = 64 * 1024  # one record and one system call, where a copy costs less than either
PIECE_BYTES = 256 * 1024  # stays in the second-level cache between cipher and system call
ALIGNMENT = 16  # of each tensor from the start of its storage, for vector loads
MAX_HEADER_BYTES = 256 * 1024  # with the specs it must fit one record
MAX_TENSORS = 255  # counted in one byte
MAX_DIMS = 8

_HEAD = Struct(">BBI")  # kind, number of tensors, header bytes
_SPEC = Struct(">BB")  # dtype, number of dimensions
_DIMS = [Struct(f">{num_dims}I") for num_dims in range(MAX_DIMS + 1)]
PADDING = [bytes(num_bytes) for num_bytes in range(ALIGNMENT)]


class FrameKind(IntEnum):
    """Who a frame is for."""

    CONTROL = 1
    DATA = 2


class DType(IntEnum):
    """Element types by their number on the wire."""

    F32 = 1
    F16 = 2
    BF16 = 3
    I8 = 4
    U8 = 5
    U32 = 6
    I32 = 7
    I64 = 8
    U64 = 9
    F64 = 10
    BOOL = 11

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEM_SIZES[self]


_ITEM_SIZES = dict(zip(DType, (4, 2, 2, 1, 1, 4, 4, 8, 8, 8, 1), strict=True))
_DTYPES = {int(dtype): dtype for dtype in DType}
_FRAME_KINDS = {int(kind): kind for kind in FrameKind}


@frozen
class TensorSpec:
    """An element type and a shape; any dimension may be 0."""

    dtype: DType
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return prod(self.shape) * _ITEM_SIZES[self.dtype]


@frozen
class Tensor:
    """A spec and its elements: C-contiguous little-endian bytes, len(data) == spec.nbytes."""

    spec: TensorSpec
    data: memoryview


class Frame(NamedTuple):  # made for every frame, in half the time of a frozen dataclass
    """A header, opaque to the transport, and tensors."""

    kind: FrameKind
    header: bytes
    tensors: tuple[Tensor, ...] = ()


@frozen
class FrameLimits:
    """What a channel takes from its peer; `check` sees header and specs before any body."""

    max_header_bytes: int
    max_tensors: int
    max_tensor_bytes: int  # of all tensors of a frame together
    check: Callable[[bytes, tuple[TensorSpec, ...]], None] | None = None  # raises FrameError


@frozen
class Layout:
    """All that the fixed part of a head says; from token to token it is the same."""

    kind: FrameKind
    specs: tuple[TensorSpec, ...]
    header_start: int
    header_stop: int
    is_inline: bool
    record_bytes: int  # of the FRAME record's plaintext
    places: tuple[tuple[int, int], ...]  # of each tensor in its storage
    gaps: tuple[tuple[int, int], ...]  # before the tensors of an inline frame, to be zero
    storage_bytes: int


def encode_frame(frame: Frame) -> tuple[bytes, list[memoryview]]:
    """Return the FRAME record's plaintext and the BODY pieces, in order. Raises: MisuseError."""
    header = frame.header
    tensors = frame.tensors
    if len(header) > MAX_HEADER_BYTES or len(tensors) > MAX_TENSORS:
        raise MisuseError(
            f"a frame holds {MAX_HEADER_BYTES} header bytes and {MAX_TENSORS} tensors, "
            f"not {len(header)} and {len(tensors)}"
        )
    parts: list[bytes | memoryview] = [_HEAD.pack(frame.kind, len(tensors), len(header))]
    size = _HEAD.size + len(header)
    for tensor in tensors:
        spec = _encode_spec(tensor)
        parts.append(spec)
        size += len(spec)
    parts.append(header)
    num_head_parts = len(parts)
    for tensor in tensors:
        padding = -size % ALIGNMENT
        size += padding + len(tensor.data)
        parts += (PADDING[padding], tensor.data)
    if size <= INLINE_BYTES:
        return b"".join(parts), []
    return b"".join(parts[:num_head_parts]), _pieces(tensors)


def _encode_spec(tensor: Tensor) -> bytes:
    spec, data = tensor.spec, tensor.data
    encoded, num_bytes = _encoded_spec(spec.dtype, spec.shape)
    if data.nbytes != num_bytes or data.itemsize != 1 or not data.c_contiguous:
        raise MisuseError(f"{spec} needs as many contiguous bytes, not {data.nbytes}")
    return encoded


@lru_cache(maxsize=256)  # a pipeline repeats a few shapes for every token
def _encoded_spec(dtype: DType, shape: tuple[int, ...]) -> tuple[bytes, int]:
    spec = TensorSpec(dtype, shape)
    try:
        return _SPEC.pack(dtype, len(shape)) + _DIMS[len(shape)].pack(*shape), spec.nbytes
    except (IndexError, StructError) as error:
        raise MisuseError(f"{spec} has more or longer dimensions than a frame") from error


def _pieces(tensors: tuple[Tensor, ...]) -> list[memoryview]:
    return [
        tensor.data[start : start + PIECE_BYTES]
        for tensor in tensors
        for start in range(0, len(tensor.data), PIECE_BYTES)
    ]


def decode_layout_untrusted(plain: memoryview, limits: FrameLimits) -> Layout:
    """Parse the fixed part of a FRAME record and hold it to the limits. Raises: FrameError."""
    try:
        number, num_tensors, header_bytes = _HEAD.unpack_from(plain)
        if num_tensors > limits.max_tensors or header_bytes > limits.max_header_bytes:
            raise FrameError(
                f"a frame with {num_tensors} tensors and {header_bytes} header bytes; "
                f"this channel takes {limits.max_tensors} and {limits.max_header_bytes}"
            )
        specs, header_start = _decode_specs(plain, num_tensors)
        kind = _FRAME_KINDS[number]
    except (StructError, KeyError, IndexError) as error:
        raise FrameError("the head of a frame is malformed") from error
    tensor_bytes = sum(spec.nbytes for spec in specs)
    if tensor_bytes > limits.max_tensor_bytes:
        raise FrameError(
            f"a frame with {tensor_bytes} tensor bytes; this channel takes "
            f"{limits.max_tensor_bytes}"
        )
    header_stop = header_start + header_bytes
    places, inline_bytes = _places(specs, header_stop)
    is_inline = inline_bytes <= INLINE_BYTES
    storage_bytes = inline_bytes
    if not is_inline:
        places, storage_bytes = _places(specs, 0)
    ends = (header_stop, *(stop for _, stop in places))
    gaps = [(end, start) for end, (start, _) in zip(ends, places, strict=False) if start > end]
    return Layout(
        kind=kind,
        specs=specs,
        header_start=header_start,
        header_stop=header_stop,
        is_inline=is_inline,
        record_bytes=inline_bytes if is_inline else header_stop,
        places=places,
        gaps=tuple(gaps) if is_inline else (),
        storage_bytes=storage_bytes,
    )


class FrameForm:
    """A small frame laid out once, to be filled in again and again, and for others to compare.

    `plain` is all of it, writable; the header is from header_start to header_stop, each tensor
    from the first to the second of its place.
    """

    __slots__ = ("header_start", "header_stop", "places", "plain")

    def __init__(self, frame: Frame) -> None:
        """Lay `frame` out. Raises: MisuseError where it does not fit one record."""
        encoded, pieces = encode_frame(frame)
        if pieces:
            raise MisuseError(f"a frame of more than {INLINE_BYTES} bytes has no form")
        layout = decode_layout_untrusted(memoryview(encoded), _ANY)
        self.plain = memoryview(bytearray(encoded))
        self.header_start, self.header_stop = layout.header_start, layout.header_stop
        self.places = layout.places


_ANY = FrameLimits(MAX_HEADER_BYTES, MAX_TENSORS, INLINE_BYTES)


def _decode_specs(plain: memoryview, num_tensors: int) -> tuple[tuple[TensorSpec, ...], int]:
    position = _HEAD.size
    specs = []
    for _ in range(num_tensors):
        dtype, num_dims = _SPEC.unpack_from(plain, position)
        dims = _DIMS[num_dims]
        shape = dims.unpack_from(plain, position + _SPEC.size)
        specs.append(TensorSpec(_DTYPES[dtype], shape))
        position += _SPEC.size + dims.size
    return tuple(specs), position


def _places(specs: tuple[TensorSpec, ...], end: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Lay tensors out one after the other, aligned, behind `end`."""
    places = []
    for spec in specs:
        start = end + -end % ALIGNMENT
        end = start + spec.nbytes
        places.append((start, end))
    return tuple(places), end
