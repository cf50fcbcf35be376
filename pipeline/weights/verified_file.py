"""A weight file read once, front to back: hashed, checked and copied in the same pass.

The host owns the disk and may swap or rewrite a file between two reads. So each file is opened
once, each byte is read once, and what was hashed is exactly what was copied. Of packed weights the
scales are read before, and have to be the same then. Where a file's pieces are pinned, those that
hold its header or a wanted tensor are read, and of the others nothing.
"""

import math
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.dtypes import HostArray, to_floats
from pipeline.errors import ModelError
from pipeline.progress import Meter
from pipeline.weights.checkpoint_header import (
    RAW_DTYPES,
    Header,
    StoredTensor,
    as_rows,
    fill,
    open_file,
)
from pipeline.weights.file_pieces import OTHER_WEIGHTS, FilePin, PieceCheck, Pieces, pieces_with
from pipeline.weights.headers import read_any_header
from pipeline.weights.read_ahead import PLACES, run_ahead
from pipeline.weights.tensor_sinks import ROWS_TOGETHER, Sink

BLOCK_BYTES = 1 << 20  # read at a time: large enough for the disk, small enough for the caches
MAX_LANES = 2  # threads that hash; what else there is to do takes as long


class _Block(NamedTuple):
    """Bytes from `at` on: whole rows of a wanted tensor, from row `first`; overwritten soon after.

    Or of no tensor: bytes that are only hashed.
    """

    at: int
    data: memoryview
    stored: StoredTensor | None = None
    first: int = 0


def load_file(
    path: Path,
    destinations: Mapping[str, Sink],
    pin: FilePin | None,
    meter: Meter,
    num_threads: int,
) -> set[str]:
    """Copy what `destinations` wants from `path` and return the names found.

    `pin`: what the file has to be. Nothing may be used before this returns. Raises ModelError.
    """
    with open_file(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        pieces = None if pin is None else pin.of(file_bytes)
        if pieces is not None and pieces.file_bytes != file_bytes:
            raise ModelError(
                f"{path} has {file_bytes} bytes, expected {pieces.file_bytes}: {OTHER_WEIGHTS}"
            )
        header = read_any_header(file, path)
        found = {stored.name: stored for stored in header.tensors if stored.name in destinations}
        for name, tensor in found.items():
            _check_fits(path, tensor, destinations[name])
        checks = [] if pieces is None else _checks(path, pieces, num_threads)
        blocks = _read_blocks(file, path, header, found.keys(), pieces, meter, 1 + len(checks))
        with ExitStack() as stack:
            ahead = stack.enter_context(closing(run_ahead(blocks)))
            for check in checks:  # each by a thread that does nothing else: it takes the longest
                ahead = stack.enter_context(closing(run_ahead(_hashed(ahead, check))))
            for _, data, stored, first in ahead:
                if stored is not None:
                    destinations[stored.name].write(first, _rows(stored, data))
    return set(found)


def _checks(path: Path, pieces: Pieces, num_threads: int) -> list[PieceCheck]:
    """One for each thread that hashes: not more than there are pieces."""
    num_pieces = -(-pieces.file_bytes // pieces.piece_bytes)
    num_lanes = max(1, min(MAX_LANES, num_threads, num_pieces))
    return [PieceCheck(path, pieces, lane, num_lanes) for lane in range(num_lanes)]


def _hashed(blocks: Iterator[_Block], check: PieceCheck) -> Iterator[_Block]:
    for block in blocks:
        check.update(block.at, block.data)
        yield block
    check.finish()


def _read_blocks(
    file: FileIO,
    path: Path,
    header: Header,
    wanted: Collection[str],
    pieces: Pieces | None,
    meter: Meter,
    num_turns: int,
) -> Iterator[_Block]:
    """What is wanted, block by block, and all else of the pieces with any of it, in their order.

    A block's memory is used again `PLACES` later for each of `num_turns` threads that hand it on:
    it is read, hashed, and then packed.
    """
    buffers = deque(bytearray(BLOCK_BYTES) for _ in range(num_turns * PLACES))
    position = len(header.raw)
    file_bytes = os.fstat(file.fileno()).st_size if pieces is None else pieces.file_bytes
    piece_bytes = max(1, file_bytes) if pieces is None else pieces.piece_bytes
    tensors = [
        (position + each.start, position + each.end, each)
        for each in header.tensors
        if each.name in wanted
    ]
    spans = [(0, position), *((start, end) for start, end, _ in tensors)]
    needed = () if pieces is None else pieces_with(spans, piece_bytes)

    def read(at: int, size: int, stored: StoredTensor | None = None, first: int = 0) -> _Block:
        if size > len(buffers[0]):
            buffers[0] = bytearray(size)
        data = memoryview(buffers[0])[:size]
        file.seek(at)
        fill(file, path, data)
        meter.add(size)
        buffers.rotate(-1)
        return _Block(at, data, stored, first)

    def pass_over(start: int, end: int) -> Iterator[_Block]:
        while start < end:
            piece = start // piece_bytes
            stop = min(end, (piece + 1) * piece_bytes)
            if piece in needed:
                stop = min(stop, start + BLOCK_BYTES)
                yield read(start, stop - start)
            else:
                meter.add(stop - start)
            start = stop

    meter.add(position)
    yield _Block(0, memoryview(header.raw))
    for start, end, stored in tensors:
        # What is only hashed is not read by its own rows, which may be as large as the disk.
        yield from pass_over(position, start)
        for first, offset, size in _spans(stored):
            yield read(start + offset, size, stored, first)
        position = end
    yield from pass_over(position, file_bytes)  # a file may be padded


def _spans(stored: StoredTensor) -> Iterator[tuple[int, int, int]]:
    """(first row, offset, bytes) of blocks of whole rows, many at a time, as kernels pack them.

    Of a stack, those of one matrix at a time.
    """
    num_bytes = stored.end - stored.start
    num_rows = as_rows(stored.shape)[0] if stored.shape else 1
    row_bytes = max(1, num_bytes // max(1, num_rows))
    of_matrix = num_bytes // max(1, stored.shape[0]) if len(stored.shape) > 2 else num_bytes
    together = math.lcm(ROWS_TOGETHER, max(1, stored.pair_rows))
    most = max(1, BLOCK_BYTES // row_bytes // together) * together * row_bytes
    for matrix in range(0, num_bytes, max(1, of_matrix)):
        for start in range(matrix, matrix + of_matrix, most):
            yield start // row_bytes, start, min(most, matrix + of_matrix - start)


def _rows(stored: StoredTensor, block: memoryview) -> HostArray:
    rows = np.frombuffer(block, RAW_DTYPES[stored.dtype]).reshape(-1, *as_rows(stored.shape)[1:])
    if stored.pair_rows:
        pairs = rows.reshape(-1, stored.pair_rows // 2, 2, *stored.shape[1:])
        rows = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
    return to_floats(rows) - np.float32(stored.added) if stored.added else rows


def _check_fits(path: Path, stored: StoredTensor, destination: Sink) -> None:
    if stored.shape != destination.shape:
        raise ModelError(
            f"{path}: tensor {stored.name} has shape {list(stored.shape)}, config.json means "
            f"{list(destination.shape)}: config and weights do not belong together"
        )
    if stored.dtype not in destination.dtypes:
        raise ModelError(
            f"{path}: tensor {stored.name} is stored as {stored.dtype}: "
            f"use weights in one of {', '.join(destination.dtypes)}"
        )
