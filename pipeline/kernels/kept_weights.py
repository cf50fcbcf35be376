"""A shard's weights in memory that outlives its process: left there, or found there."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.dtypes import PRECISIONS
from pipeline.errors import InputError
from pipeline.kernels.base import Kernels
from pipeline.kernels.sealed_memory import Record, SealedMemory

logger = logging.getLogger(__name__)

LAYOUT = "layout"
VERSION = 1  # of how kernels lay out weights, keys and values, whatever the shapes


class KeptWeights:
    """The weights of one shard, on native kernels that hold them in such memory."""

    def __init__(self, memory: SealedMemory, sizes: list[int], meaning: Record) -> None:
        self._memory = memory
        self._sizes = sizes
        self._meaning = meaning
        # Whether they are there, verified, and nothing has to be read.
        self.is_found = memory.is_sealed

    def check_layout(self) -> None:
        """Once all layers are made: that each found its own. Raises InputError."""
        if self._memory.record().get(LAYOUT) != self._layout():
            raise InputError("the weights that were handed over are laid out in another way")

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Seal what is filled within; where that fails, nobody finds it."""
        try:
            yield
        except BaseException:
            self._memory.discard()
            raise
        try:
            self._memory.seal({**self._meaning, LAYOUT: self._layout()})
        except OSError as error:
            logger.warning("event=weights_not_shared detail=%r", str(error))

    def _layout(self) -> str:
        return hashlib.sha256(json.dumps(self._sizes).encode()).hexdigest()


def native_layout(kernels: Kernels) -> Record | None:
    """What all that native kernels keep depends on; None for others."""
    if kernels.name != "native":
        return None
    from pipeline.kernels import _native  # noqa: PLC0415 (may be absent)

    # Whatever level computes, weights of a kind are packed alike.
    kinds = [feature for feature in _native.features() if feature in PRECISIONS]
    return {"kinds": kinds, "version": VERSION}


def keep_weights(kernels: Kernels, memory: SealedMemory, meaning: Record) -> KeptWeights | None:
    """Have `kernels` hold the weights that `meaning` says there; None for kernels that cannot.

    None too for memory with others than these: they are left alone, and loaded as usual.
    """
    if (layout := native_layout(kernels)) is None:
        return None
    from pipeline.kernels import native_kernels  # noqa: PLC0415 (may be absent)

    assert isinstance(kernels, native_kernels.NativeKernels)
    meaning = {**meaning, **layout}
    meaning = json.loads(json.dumps(meaning))  # as it comes back
    if memory.is_sealed:
        found = {**memory.record()}
        found.pop(LAYOUT, None)
        if found != meaning:
            differing = ",".join(key for key in meaning if found.get(key) != meaning[key])
            logger.warning("event=other_weights_handed_over differing=%s", differing)
            return None
    kernels.hold_weights_in(memory)
    return KeptWeights(memory, kernels.arena.sizes, meaning)
