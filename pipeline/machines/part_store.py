"""Parts of models on a machine's disk, each in a file named by its SHA-256.

What comes over a link is believed by nothing but its hash: a file is there under its name when all
its bytes are, and have that hash. Attacks: a part that is another; a disk filled up; half a part
taken for a whole one.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipeline.errors import InputError, PipelineError

PARTIAL = ".partial"
# So much stays free for others, where no quota says what may be taken.
SPARE_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20
_NAME = re.compile(r"[0-9a-f]{64}")


class PartRefused(PipelineError):
    """A part cannot be kept: too large, not what its name says, or the disk errs."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part that is whole."""

    digest: str
    num_bytes: int


class PartStore:
    """The parts of one machine, below one directory and within one quota."""

    def __init__(self, directory: Path, quota_bytes: int | None) -> None:
        """`quota_bytes`: None for what the disk has. Raises InputError."""
        self._directory = directory
        self._quota_bytes = quota_bytes
        self._coming: dict[str, int] = {}
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot keep parts in {directory}: {error.strerror}") from error

    def path(self, digest: str) -> Path:
        """Where a part is, if it is there."""
        assert _NAME.fullmatch(digest), "names come from messages that check them"
        return self._directory / digest

    def has(self, digest: str) -> bool:
        """Whether a part is there whole."""
        return self.path(digest).is_file()

    def parts(self) -> list[StoredPart]:
        """What is there whole, by name."""
        return [
            StoredPart(path.name, path.stat().st_size)
            for path in sorted(self._directory.iterdir())
            if _NAME.fullmatch(path.name) and path.is_file()
        ]

    def free_bytes(self) -> int:
        """What more may be stored, beside what is on its way."""
        free = shutil.disk_usage(self._directory).free
        files = {path.name: path.stat().st_size for path in self._directory.iterdir()}
        # Of what is coming, a piece lies on the disk already.
        missing = sum(
            size - files.get(digest + PARTIAL, 0) for digest, size in self._coming.items()
        )
        left = free - SPARE_BYTES
        if self._quota_bytes is not None:
            left = min(free, self._quota_bytes - sum(files.values()))
        return max(0, left - missing)

    def begin(self, digest: str, num_bytes: int) -> "Upload":
        """Take a part, from where it was cut off before. Raises PartRefused."""
        if digest in self._coming:
            raise PartRefused("this part is being sent by somebody else; wait, and try again")
        partial = self.path(digest).with_name(digest + PARTIAL)
        there = partial.stat().st_size if partial.is_file() else 0
        if there > num_bytes:
            partial.unlink()
            there = 0
        free = self.free_bytes()
        if num_bytes - there > free:
            raise PartRefused(
                f"{(num_bytes - there) / 1e6:.1f} MB do not fit, {free / 1e6:.1f} MB are free for "
                "parts here; remove old ones by `pipeline-orch parts --remove-unused`, or raise "
                "the machine's --disk"
            )
        self._coming[digest] = num_bytes
        try:
            return Upload(self, digest, num_bytes, partial)
        except OSError as error:
            del self._coming[digest]
            raise PartRefused(f"the disk errs: {error.strerror}") from error

    def end(self, digest: str) -> None:
        """A part is no longer coming."""
        self._coming.pop(digest, None)

    def remove(self, digests: Iterable[str], kept: Collection[str] = ()) -> None:
        """Remove parts, and what of them has come; not those in `kept`. Raises PartRefused."""
        for digest in digests:
            if digest in kept or digest in self._coming:
                raise PartRefused(f"part {digest[:16]}… is in use")
            self.path(digest).unlink(missing_ok=True)
            self.path(digest).with_name(digest + PARTIAL).unlink(missing_ok=True)


class Upload:
    """A part on its way to the disk. Use it as a context: what has come stays for the next try."""

    def __init__(self, store: PartStore, digest: str, num_bytes: int, path: Path) -> None:
        self._store = store
        self._digest = digest
        self._num_bytes = num_bytes
        self._path = path
        self._hash = hashlib.sha256()
        self._file = path.open("ab")
        self.offset = 0
        try:
            with path.open("rb") as before:
                while block := before.read(_BLOCK_BYTES):
                    self._hash.update(block)
                    self.offset += len(block)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk: `write` or `finish` has said so, or nobody asks
            self._file.close()
        self._store.end(self._digest)

    def is_whole(self) -> bool:
        """Whether all bytes have come."""
        return self.offset == self._num_bytes

    def write(self, data: memoryview) -> None:
        """Take the next bytes. Raises PartRefused."""
        if self.offset + len(data) > self._num_bytes:
            raise PartRefused(f"more than the {self._num_bytes} bytes come that were announced")
        try:
            self._file.write(data)
        except OSError as error:
            raise PartRefused(f"the disk errs: {error.strerror}") from error
        self._hash.update(data)
        self.offset += len(data)

    def finish(self) -> None:
        """Hold the whole against its name. Raises PartRefused, and drops it, where it differs."""
        if self._hash.hexdigest() != self._digest:
            self._path.unlink()
            raise PartRefused("what has come has another hash than it should; send it again")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._path.replace(self._store.path(self._digest))
        except OSError as error:
            raise PartRefused(f"the disk errs: {error.strerror}") from error
