"""The pieces of a weight file, each with a hash: whoever wants a part verifies that part alone.

A manifest lists them beside the hash of the whole file. Attack: the list is of other weights than
that hash, which people know from elsewhere. Nothing but a hash of all bytes tells, and no stage
takes one: it holds what it reads against the pieces, where there are any. So both are of the core,
whoever agrees to a manifest agrees to both, and whoever did not write it plans the same files anew,
which gives the same pieces.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.errors import ModelError

# As much as two threads that hash every other piece have on the way at a time.
MIN_PIECE_BYTES = 4 << 20
# Of all files together: 192 KiB, of the 256 that an object may have which Kubernetes applies.
MAX_PIECES = 3072
HEX_DIGITS = 64  # of a SHA-256
OTHER_WEIGHTS = (
    "these are not the weights the manifest was written for: fetch them again, or write the "
    "manifest for this model"
)


class Pieces(Protocol):
    """Hashes of all pieces of a file: each of `piece_bytes`, but for the last."""

    @property
    def file_bytes(self) -> int:
        """Of the whole file."""

    @property
    def piece_bytes(self) -> int:
        """Of a piece."""

    @property
    def hashes(self) -> str:
        """SHA-256 of each in hex, one behind the other."""


class FilePieces(NamedTuple):
    """Those that were found."""

    file_bytes: int
    piece_bytes: int
    hashes: str


class FilePin(NamedTuple):
    """What a file has to be: its SHA-256 in hex, and its pieces where it has several."""

    digest: str
    pieces: Pieces | None = None

    @property
    def name(self) -> str:
        """As long as a hash, and another's for another pin."""
        if (pieces := self.pieces) is None:
            return self.digest
        text = f"{self.digest} {pieces.file_bytes} {pieces.piece_bytes} {pieces.hashes}"
        return hashlib.sha256(text.encode()).hexdigest()

    def of(self, file_bytes: int) -> Pieces:
        """Its pieces, or all of it as the only one."""
        return self.pieces or FilePieces(file_bytes, max(1, file_bytes), self.digest)


def pins_of(hashes: Iterable[str], pieces: Mapping[str, Pieces]) -> list[FilePin]:
    """The pins of files with these hashes, by what there is of pieces."""
    return [FilePin(each.lower(), pieces.get(each.lower())) for each in hashes]


def piece_bytes_of(file_bytes: int, num_files: int) -> int:
    """The size of the pieces of one of so many files: a power of two."""
    size, most = MIN_PIECE_BYTES, max(1, MAX_PIECES // num_files)
    while size * most < file_bytes:
        size *= 2
    return size


def pieces_with(ranges: Iterable[tuple[int, int]], piece_bytes: int) -> Collection[int]:
    """The pieces that have a byte of these ranges (first, behind the last)."""
    return {
        index
        for start, end in ranges
        for index in range(start // piece_bytes, -(-end // piece_bytes))
    }


class PieceHasher:
    """Hashes the pieces of a file whose blocks go by in order, where it has several."""

    def __init__(self, file_bytes: int, piece_bytes: int) -> None:
        self._file_bytes, self._piece_bytes = file_bytes, piece_bytes
        self._left = piece_bytes
        self._digest = hashlib.sha256()
        self._hashes: list[str] = []

    def update(self, block: memoryview) -> None:
        """The next bytes."""
        while len(block) and self._file_bytes > self._piece_bytes:
            part, block = block[: self._left], block[self._left :]
            self._digest.update(part)
            self._left -= len(part)
            if not self._left:
                self._next()

    def _next(self) -> None:
        self._hashes.append(self._digest.hexdigest())
        self._digest, self._left = hashlib.sha256(), self._piece_bytes

    def pieces(self) -> FilePieces | None:
        """After the last byte."""
        if self._file_bytes <= self._piece_bytes:
            return None
        if self._left < self._piece_bytes:
            self._next()
        return FilePieces(self._file_bytes, self._piece_bytes, "".join(self._hashes))


class PieceCheck:
    """Holds pieces of a file against their hashes as blocks go by: one lane of several.

    A lane has one piece in so many. What has gone by all lanes until `finish` is verified.
    """

    def __init__(self, path: Path, pieces: Pieces, lane: int, num_lanes: int) -> None:
        self._path, self._pieces = path, pieces
        self._lane, self._num_lanes = lane, num_lanes
        self._digest = hashlib.sha256()
        self._at: int | None = None  # how far the piece is that has begun

    def update(self, at: int, block: memoryview) -> None:
        """Bytes from `at` on. Raises ModelError at the end of a piece that is another."""
        size = self._pieces.piece_bytes
        while len(block):
            index, offset = divmod(at, size)
            part = block[: size - offset]
            if index % self._num_lanes == self._lane:
                self._add(index, at, part)
            at, block = at + len(part), block[len(part) :]

    def finish(self) -> None:
        """Raises ModelError where a piece did not go by as a whole."""
        if self._at is not None:
            raise self._torn()

    def _add(self, index: int, at: int, part: memoryview) -> None:
        start = index * self._pieces.piece_bytes
        if at != (start if self._at is None else self._at):
            raise self._torn()
        self._digest.update(part)
        self._at = at + len(part)
        end = min(start + self._pieces.piece_bytes, self._pieces.file_bytes)
        if self._at == end:
            self._compare(index, start, end)
            self._digest, self._at = hashlib.sha256(), None

    def _torn(self) -> ModelError:
        return ModelError(f"{self._path}: a piece was not read as a whole: fetch the file again")

    def _compare(self, index: int, start: int, end: int) -> None:
        actual = self._digest.hexdigest()
        expected = self._pieces.hashes[HEX_DIGITS * index : HEX_DIGITS * (index + 1)].lower()
        if actual != expected:
            is_whole = end - start == self._pieces.file_bytes
            what = "" if is_whole else f", bytes {start} to {end - 1},"
            raise ModelError(
                f"{self._path}{what} has SHA-256 {actual}, expected {expected}: {OTHER_WEIGHTS}"
            )
