"""A file of one-time masks, and of what checks need: its layout, and how it is written.

A mask is a row r of random words for the inputs of every linear, and what the linear makes of it,
r W. Of these the file holds r W; r comes from the file's seed again. So the file is as secret as
all that is ever hidden by it, and whoever copies it must use one copy only.

    16 bytes   what this is
    u64        how many masks are used up
    u64        length of the header
    header     JSON: see `MaskHeader`
    u64 words  from the next 4096 bytes on: W^T s of each linear, [in, NUM_VECTORS]
    u64 words  from the next 4096 bytes on: r W of each mask, [num_masks, out of every linear]
"""

import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import InputError
from pipeline.offload.freivalds import NUM_VECTORS, SecretVectors, project_weight
from pipeline.offload.key_stream import KEY_BYTES, derive_key, random_words
from pipeline.offload.ring import Words
from pipeline.offload.ring_linear import HeldLinear
from pipeline.progress import Meter, Progress

MAGIC = b"veilpipe masks 1"
PREFIX = struct.Struct("<16sQQ")
USED_AT = 16
WORD = 8
MASKS_TOGETHER = 64  # rows of a product while masks are made
_PAGE = 4096
_MAX_HEADER = 1 << 24

Count = Annotated[int, Field(ge=1, lt=1 << 40)]


class LinearShape(BaseModel):
    """A linear that there are masks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_in: Count
    num_out: Count
    reach: Annotated[int, Field(ge=1, lt=1 << 62)]  # see `fixed_point.to_ring`


class MaskHeader(BaseModel):
    """What a file of masks says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    weight_hashes: tuple[str, ...]  # of the model's files
    num_masks: Count
    linears: Annotated[tuple[LinearShape, ...], Field(min_length=1)]

    @property
    def mask_words(self) -> int:
        """Of one mask's r W."""
        return sum(each.num_out for each in self.linears)

    def mask_key(self) -> bytes:
        """What r comes from."""
        return derive_key(bytes.fromhex(self.seed), b"masks")

    def vectors(self) -> SecretVectors:
        """What answers are checked with."""
        return SecretVectors(derive_key(bytes.fromhex(self.seed), b"vectors"))

    def places(self, header_bytes: int) -> tuple[int, int, int]:
        """Where projections and masks begin, and where the file ends."""
        projections = _round_up(PREFIX.size + header_bytes)
        num_inputs = sum(each.num_in for each in self.linears)
        masks = _round_up(projections + WORD * num_inputs * NUM_VECTORS)
        return projections, masks, masks + WORD * self.num_masks * self.mask_words


def read_header(file: BinaryIO, path: Path) -> tuple[MaskHeader, int]:
    """The header, and its bytes. Raises InputError for what is no file of masks, or a part of one.

    The file's owner wrote it; that it was cut off, or is something else, is found out.
    """
    start = file.read(PREFIX.size)
    magic, length = b"", 0
    if len(start) == PREFIX.size:
        magic, _, length = PREFIX.unpack(start)
    if magic != MAGIC or length > _MAX_HEADER:
        raise InputError(f"{path} is no file of masks; make one with `pipeline-orch masks make`")
    try:
        header = MaskHeader.model_validate_json(file.read(length))
    except ValidationError as error:
        raise InputError(f"{path}: the header of this file of masks is damaged") from error
    _, _, end = header.places(length)
    size = os.fstat(file.fileno()).st_size
    if size != end:
        raise InputError(
            f"{path} has {size} bytes, its masks take {end}: it was cut off; make anew"
        )
    return header, length


def masks_of(key: bytes, tokens: Sequence[int], index: int, num_in: int) -> Words:
    """Words r of masks `tokens` for a linear, by its index: [tokens, in]."""
    rows = [random_words(key, num_in, token, index) for token in tokens]
    return np.stack(rows) if rows else np.empty((0, num_in), np.uint64)


def write_masks(
    path: Path,
    linears: Sequence[HeldLinear],
    weight_hashes: Sequence[str],
    num_masks: int,
    progress: Progress | None = None,
) -> None:
    """Write a new file of masks, its owner's alone, whole or not at all. Raises InputError."""
    header = MaskHeader(
        seed=secrets.token_hex(KEY_BYTES),
        weight_hashes=tuple(weight_hashes),
        num_masks=num_masks,
        linears=tuple(
            LinearShape(name=each.name, num_in=each.num_in, num_out=each.num_out, reach=each.reach)
            for each in linears
        ),
    )
    temporary = path.with_name(f".veilpipe.{secrets.token_hex(8)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(temporary, flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _write(file, header, linears, progress)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike a rename, never over masks that are there
        finally:
            temporary.unlink()
        _sync_directory(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _write(
    file: BinaryIO, header: MaskHeader, linears: Sequence[HeldLinear], progress: Progress | None
) -> None:
    text = header.model_dump_json().encode()
    projections, masks, end = header.places(len(text))
    os.posix_fallocate(file.fileno(), 0, end)  # a disk that is too small says so at once
    file.write(PREFIX.pack(MAGIC, 0, len(text)))
    file.write(text)
    file.seek(projections)
    vectors = header.vectors()
    projected = (project_weight(vectors, each.matrix.transposed()) for each in linears)
    file.writelines(each.astype("<u8", copy=False).tobytes() for each in projected)
    file.seek(masks)
    meter = Meter(end - masks, progress)
    for rows in _made(header, linears):
        file.write(rows.astype("<u8", copy=False).tobytes())
        meter.add(rows.nbytes)


def _made(header: MaskHeader, linears: Sequence[HeldLinear]) -> Iterator[Words]:
    """Words r W of all masks, some at a time: [tokens, mask_words]."""
    key = header.mask_key()
    for first in range(0, header.num_masks, MASKS_TOGETHER):
        tokens = range(first, min(first + MASKS_TOGETHER, header.num_masks))
        products = [
            each.product(masks_of(key, tokens, index, each.num_in))
            for index, each in enumerate(linears)
        ]
        yield np.concatenate(products, axis=1)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
