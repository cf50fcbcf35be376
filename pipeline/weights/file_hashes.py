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


class FileHasher:
    """Hashes a file's blocks as they go by: the file by one thread, its pieces by another."""

    def __init__(self, file_bytes: int, num_files: int) -> None:
        """One of so many files."""
        self._digest = hashlib.sha256()
        self._pieces = PieceHasher(file_bytes, piece_bytes_of(file_bytes, num_files))

    def hashed(self, blocks: Iterator[memoryview]) -> Iterator[memoryview]:
        """The same blocks, each when it is hashed; `blocks` come from a thread of their own."""
        with closing(run_ahead(self._in_whole(blocks))) as ahead:
            for block in ahead:
                self._pieces.update(block)
                yield block

    def _in_whole(self, blocks: Iterator[memoryview]) -> Iterator[memoryview]:
        for block in blocks:
            self._digest.update(block)
            yield block

    def pin(self) -> FilePin:
        """After the last block."""
        return FilePin(self._digest.hexdigest(), self._pieces.pieces())


def hash_file(path: Path, meter: Meter) -> str:
    """SHA-256 in hex. Raises ModelError."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        for block in _blocks(file, path, meter):
            digest.update(block)
    return digest.hexdigest()


def pin_file(path: Path, num_files: int, meter: Meter) -> FilePin:
    """What one of so many files is pinned by. Raises ModelError."""
    with open_file(path) as file:
        left = os.fstat(file.fileno()).st_size
        hasher = FileHasher(left, num_files)
        for block in hasher.hashed(_blocks(file, path, meter)):
            left -= len(block)
    if left:
        raise ModelError(f"{path} changed while it was read: write the manifest when it is whole")
    return hasher.pin()


def _blocks(file: FileIO, path: Path, meter: Meter) -> Iterator[memoryview]:
    """All of it; memory is used again `PLACES` blocks later."""
    buffers = deque(memoryview(bytearray(READ_BYTES)) for _ in range(PLACES))
    while count := read_into(file, path, buffers[0]):
        yield buffers[0][:count]
        meter.add(count)
        buffers.rotate(-1)
