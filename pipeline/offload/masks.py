"""Masks as they are used up: each hides one row of each linear, once."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.errors import InputError, PolicyError
from pipeline.offload.freivalds import NUM_VECTORS, ProductCheck
from pipeline.offload.mask_file import USED_AT, WORD, masks_of, read_header
from pipeline.offload.mask_ledger import MaskLedger
from pipeline.offload.ring import Words
from transport.errors import MisuseError
from transport.private_files import open_private


class Hidden(NamedTuple):
    """Masks of some rows: r [rows, in], and r W [rows, out]."""

    masks: Words
    products: Words


class Masks:
    """The masks of a file. Several threads may draw at once, and several processes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Use `open_masks`."""
        header, length = read_header(file, path)
        projections, masks, _ = header.places(length)
        file.seek(projections)
        num_words = sum(each.num_in for each in header.linears) * NUM_VECTORS
        words = np.frombuffer(file.read(WORD * num_words), "<u8").astype(np.uint64, copy=False)
        self.header = header
        self._file = file
        self._ledger = MaskLedger(file.fileno(), USED_AT, header.num_masks)
        # W^T s of one linear after another, and r W of every mask
        self._checks = words.reshape(-1, NUM_VECTORS)
        shape = (header.num_masks, header.mask_words)
        self._stored = np.memmap(file, "<u8", "r", masks, shape)
        self._key = header.mask_key()
        self._vectors = header.vectors()
        outs = [each.num_out for each in header.linears]
        self._starts = np.concatenate([[0], np.cumsum(outs)]).tolist()
        # Masks that are reserved, in turn, and how many of them each linear has used.
        self._tokens: list[int] = []
        self._used = [0] * len(outs)
        self._lock = threading.Lock()

    @property
    def num_left(self) -> int:
        """How many nobody has drawn yet."""
        return self._ledger.num_left

    def draw(self, index: int, count: int) -> Hidden:
        """Masks for the next rows of a linear, by its index. Raises MasksSpent, MasksUnusable."""
        with self._lock:
            start, end = self._used[index], self._used[index] + count
            if end > len(self._tokens):
                self._tokens += self._ledger.reserve(end - len(self._tokens))
            self._used[index] = end
            tokens = self._tokens[start:end]
        own = slice(self._starts[index], self._starts[index + 1])
        masks = masks_of(self._key, tokens, index, self.header.linears[index].num_in)
        return Hidden(masks, np.asarray(self._stored[tokens, own]))

    def checks(self) -> Sequence[ProductCheck]:
        """What tells right answers from wrong ones, for each linear."""
        ends = np.cumsum([each.num_in for each in self.header.linears])[:-1]
        parts = np.split(self._checks, ends)
        return [ProductCheck(self._vectors, each) for each in parts]

    def close(self) -> None:
        """Nothing is drawn any more."""
        self._file.close()


def open_masks(path: Path) -> Masks:
    """The masks in a file that nobody else may read. Raises InputError, PolicyError."""
    try:
        file = open_private(path, writes=True)
    except MisuseError as error:
        raise PolicyError(f"--masks: {error}") from error
    except OSError as error:
        raise InputError(f"--masks: cannot use {path}: {error.strerror}") from error
    try:
        return Masks(file, path)
    except BaseException:
        file.close()
        raise
