"""The hash of a file and of its pieces, in one pass over its bytes."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from io import FileIO
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.progress import Meter
from pipeline.weights.checkpoint_header import open_file, read_into
from pipeline.weights.file_pieces import FilePin, PieceHasher, piece_bytes_of
from pipeline.weights.read_ahead import PLACES, run_ahead

READ_BYTES = 1 << 18  # at a time: all that are on the way stay in the caches


def hash_file(path: Path, meter: Meter) -> str:
    """SHA-256 in hex. Raises ModelError."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        for block in _blocks(file, path, meter):
            digest.update(block)
    return digest.hexdigest()


def pin_file(path: Path, num_files: int, meter: Meter) -> FilePin:
    """What one of so many files is pinned by: it and its pieces are hashed by a thread each.

    Raises ModelError.
    """
    whole = hashlib.sha256()

    def hashed(blocks: Iterator[memoryview]) -> Iterator[memoryview]:
        for block in blocks:
            whole.update(block)
            yield block

    with open_file(path) as file:
        left = file_bytes = os.fstat(file.fileno()).st_size
        pieces = PieceHasher(file_bytes, piece_bytes_of(file_bytes, num_files))
        with closing(run_ahead(hashed(_blocks(file, path, meter)))) as ahead:
            for block in ahead:
                pieces.update(block)
                left -= len(block)
    if left:
        raise ModelError(f"{path} changed while it was read: write the manifest when it is whole")
    return FilePin(whole.hexdigest(), pieces.pieces())


def _blocks(file: FileIO, path: Path, meter: Meter) -> Iterator[memoryview]:
    """All of it; memory is used again `PLACES` blocks later."""
    buffers = deque(memoryview(bytearray(READ_BYTES)) for _ in range(PLACES))
    while count := read_into(file, path, buffers[0]):
        yield buffers[0][:count]
        meter.add(count)
        buffers.rotate(-1)
