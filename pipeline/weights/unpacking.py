"""Packed weights on their way into sinks: as numbers, a piece at a time.

What the rows of a packed tensor mean is said by others, its scales above all, and a file may hold
these behind it. They are small, so they are read before, and held against what comes by when the
file is read and hashed as a whole: who rewrites a file between the two is found out.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.dtypes import FLOAT32, HostArray
from pipeline.errors import ModelError
from pipeline.weights.checkpoint_header import (
    RAW_DTYPES,
    StoredTensor,
    as_rows,
    fill,
    open_file,
)
from pipeline.weights.headers import read_any_header
from pipeline.weights.packings.base import CorruptPacking, PackedWeight, Sides
from pipeline.weights.tensor_sinks import (
    PIECE_BYTES,
    ROWS_TOGETHER,
    Sink,
    WeightSink,
    shared_sink,
    sinks_in,
)
from pipeline.weights.tensor_stacks import MatrixSink

CHANGED = "changed while it was read: fetch it again"
MAX_SIDE_BYTES = 1 << 30  # scales for each group of the largest matrices are a hundredth of it


class UnpackingSink:
    """Takes the rows of a packed tensor for the sink of its weight: as floats, or in four bits."""

    is_optional = False

    def __init__(self, weight: PackedWeight, main: StoredTensor, sides: Sides, to: Sink) -> None:
        self._packing = weight.packing
        self._sides = sides
        self._to = to
        self._is_int4 = isinstance(to, WeightSink) and to.precision == "int4"
        # Then the file held it in another way when it was decided what holds it.
        self._is_another = self._is_int4 and weight.exceeds_int4
        self.shape = main.shape
        self.dtypes: Collection[str] = (main.dtype,)

    def write(self, first: int, rows: HostArray) -> None:
        """Unpack so many at a time that they stay in the cache."""
        each = self._packing.row_weights
        most = PIECE_BYTES // max(1, FLOAT32.itemsize * self._to.shape[-1] * each)
        size = max(1, most // ROWS_TOGETHER) * ROWS_TOGETHER
        for at in range(0, len(rows), size):
            piece = (first + at, rows[at : at + size], self._sides)
            int4 = self._packing.int4(*piece) if self._is_int4 else None
            if int4 is not None and isinstance(self._to, WeightSink):
                self._to.write_int4((first + at) * each, int4)
            else:
                self._to.write((first + at) * each, self._packing.unpack(*piece))

    def problem(self) -> str | None:
        """That it would be rounded to fewer bits than what was planned, or the weight's own."""
        return CHANGED if self._is_another else self._to.problem()


class _Expected:
    """Holds a tensor as it comes against what has been read of it."""

    is_optional = False

    def __init__(self, tensor: HostArray, dtype: str) -> None:
        self._tensor = tensor.reshape(as_rows(tensor.shape))
        self.shape = tensor.shape
        self.dtypes: Collection[str] = (dtype,)
        self._is_another = False

    def write(self, first: int, rows: HostArray) -> None:
        """Compare the bits."""
        own = self._tensor[first : first + len(rows)] if self.shape else self._tensor[None]
        self._is_another |= own.tobytes() != rows.tobytes()

    def problem(self) -> str | None:
        """Whether it was another."""
        return CHANGED if self._is_another else None


def unpacking(
    weights: Mapping[str, PackedWeight], destinations: Mapping[str, Sink], paths: Sequence[Path]
) -> dict[str, Sink]:
    """Where the tensors of packed `weights` go, so that `destinations` get what they mean.

    `paths`: the files that hold them; of these the small tensors are read here. A weight that they
    lack is left to whoever misses it. Raises ModelError.
    """
    needed = {part for weight in weights.values() for part in weight.parts}
    found = _find(paths, needed)
    sinks: dict[str, Sink] = {}
    for name, weight in weights.items():
        if not found.keys() >= set(weight.parts):
            sinks[name] = destinations[name]
            continue
        path, main = found[weight.main]
        shape = weight_shape(path, weight, {part: found[part][1] for part in weight.parts})
        is_in_out = weight.packing.is_in_out
        try:
            takers = [_oriented(to, is_in_out=is_in_out) for to in sinks_in(destinations[name])]
            _check_shape(path, name, shape, takers[0], is_in_out=is_in_out)
            sides = {key: _read(*found[part]) for key, part in weight.sides.items()}
            weight.packing.check(shape, sides)
        except CorruptPacking as error:
            raise ModelError(f"{path}: tensor {name} {error}: fetch it again") from error
        sinks[weight.main] = shared_sink([UnpackingSink(weight, main, sides, to) for to in takers])
        for key, part in weight.sides.items():
            sinks[part] = _Expected(sides[key], found[part][1].dtype)
    return sinks


def weight_shape(
    path: Path, weight: PackedWeight, stored: Mapping[str, StoredTensor]
) -> tuple[int, ...]:
    """[out, in] of a weight by its tensors' entries, [n, out, in] of a stack.

    Raises ModelError naming `path`.
    """
    sides = {key: stored[part] for key, part in weight.sides.items()}
    try:
        return weight.packing.shape(stored[weight.main], sides)
    except CorruptPacking as error:
        raise ModelError(f"{path}: tensor {weight.name} {error}: fetch it again") from error


def _oriented(to: Sink, *, is_in_out: bool) -> Sink:
    assert isinstance(to, MatrixSink), "nothing else takes a matrix"
    return to.turned() if is_in_out != to.is_in_out else to


def _check_shape(
    path: Path, name: str, shape: tuple[int, ...], to: Sink, *, is_in_out: bool
) -> None:
    wanted = to.shape[::-1] if is_in_out else to.shape
    if shape != wanted:
        raise ModelError(
            f"{path}: tensor {name} has shape {list(shape)}, config.json means {list(wanted)}: "
            "config and weights do not belong together"
        )


def _find(paths: Iterable[Path], names: Collection[str]) -> dict[str, tuple[Path, StoredTensor]]:
    """Where each of these tensors is, its place counted from the file's start."""
    found = {}
    for path in paths:
        with open_file(path) as file:
            header = read_any_header(file, path)
        for stored in header.tensors:
            if stored.name in names:
                begin = len(header.raw)
                found[stored.name] = (
                    path,
                    replace(stored, start=begin + stored.start, end=begin + stored.end),
                )
    return found


def _read(path: Path, stored: StoredTensor) -> HostArray:
    """All of a tensor."""
    if stored.dtype not in RAW_DTYPES or stored.end - stored.start > MAX_SIDE_BYTES:
        raise CorruptPacking(f"has {stored.name} of {stored.dtype} {list(stored.shape)}")
    raw = bytearray(stored.end - stored.start)
    with open_file(path) as file:
        file.seek(stored.start)
        fill(file, path, memoryview(raw))
    return np.frombuffer(raw, RAW_DTYPES[stored.dtype]).reshape(stored.shape)
