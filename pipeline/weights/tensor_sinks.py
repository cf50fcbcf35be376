"""Where a checkpoint's tensors go while they are read: converted block by block, never whole.

A tensor arrives as blocks of rows in the file's dtype and leaves in the dtype it is held in, so a
stage's peak memory is its own weights and one block.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from pipeline.dtypes import (
    BFLOAT16,
    FLOAT32,
    INT8,
    PRECISIONS,
    Array,
    ArrayDType,
    HostArray,
    Precision,
    from_floats,
    to_floats,
)
from pipeline.weights.int4 import Int4, dequantise_int4, quantise_int4
from pipeline.weights.quantization import GROUP, SCALE_SUFFIX, num_groups, quantise

FLOATS = ("F32", "F16", "BF16")
# Rows come in multiples of so many, but for the last: kernels pack as many inputs together.
ROWS_TOGETHER = 64
# Weights are converted in pieces whose float32 values take this much: they stay in the cache.
PIECE_BYTES = 1 << 20

# Sets all of an array, wherever it is, to a host's of the same shape: of its dtype, or floats that
# are to become such.
Fill = Callable[[Array, HostArray], None]


class Sink(Protocol):
    """Takes one stored tensor, rows first to last, each once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What the file has to hold."""

    @property
    def dtypes(self) -> Collection[str]:
        """The stored dtypes it can take, by their names in safetensors."""

    @property
    def is_optional(self) -> bool:
        """Whether the file may lack it."""

    def write(self, first: int, rows: HostArray) -> None:
        """Take rows first..first+len(rows), [n, *shape[1:]]; `rows` is reused afterwards.

        `first` is a multiple of `ROWS_TOGETHER`. A stack of matrices comes as the rows of all of
        them, [n, the rest], those of one at a time: `first` is such a multiple of its own rows.
        """

    def problem(self) -> str | None:
        """After the last row of everything: what is wrong with what came, if anything is."""


def fill_array(target: Array, rows: HostArray) -> None:
    """Set all of a host's array."""
    target[...] = convert(rows, target.dtype)


def convert(rows: HostArray, dtype: ArrayDType) -> HostArray:
    """The same numbers, or the nearest there are, in `dtype`."""
    return rows if rows.dtype == dtype else from_floats(to_floats(rows), dtype)


class CopySink:
    """Fills an array, or a view of one, converting floats to its own.

    `is_in_out`: whether a matrix's rows are inputs of a linear, and not its outputs.
    """

    def __init__(
        self,
        target: Array,
        dtypes: Collection[str] = FLOATS,
        *,
        fill: Fill = fill_array,
        is_optional: bool = False,
        is_in_out: bool = False,
    ) -> None:
        self.target = target
        self.is_in_out = is_in_out
        self.dtypes = dtypes
        self._fill = fill
        self.is_optional = is_optional
        self.is_filled = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's own."""
        return tuple(self.target.shape)

    def write(self, first: int, rows: HostArray) -> None:
        """Copy the rows to their place."""
        if len(self.shape) > 2:
            matrix, at = divmod(first, self.shape[1])
            own = self.target[matrix][at : at + len(rows)]
            self._fill(own, rows.reshape(own.shape))
        elif self.shape:
            self._fill(self.target[first : first + len(rows)], rows)
        else:
            self._fill(self.target, rows[0])
        self.is_filled = True

    def turned(self) -> "CopySink":
        """Into the same array, by its columns."""
        return CopySink(self.target.mT, self.dtypes, is_in_out=not self.is_in_out)

    def problem(self) -> str | None:
        """Nothing can be."""
        return None


class _SharedSink:
    """One tensor that several take, each to a place of its own."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks
        self.shape = sinks[0].shape
        self.dtypes: Collection[str] = [
            each for each in sinks[0].dtypes if all(each in other.dtypes for other in sinks)
        ]
        self.is_optional = all(each.is_optional for each in sinks)

    def write(self, first: int, rows: HostArray) -> None:
        """Hand the rows to each."""
        for each in self.sinks:
            each.write(first, rows)

    def problem(self) -> str | None:
        """The first that one of them has."""
        return next(filter(None, (each.problem() for each in self.sinks)), None)


def shared_sink(sinks: Sequence[Sink]) -> Sink:
    """What takes a tensor for all of these, of one shape."""
    return sinks[0] if len(sinks) == 1 else _SharedSink(sinks)


def shared_sinks(of_each: Iterable[Mapping[str, Sink]]) -> dict[str, Sink]:
    """Sinks for all that any of these take, by the same names."""
    found: dict[str, list[Sink]] = {}
    for sinks in of_each:
        for name, sink in sinks.items():
            found.setdefault(name, []).append(sink)
    return {name: shared_sink(each) for name, each in found.items()}


def sinks_in(sink: Sink) -> Sequence[Sink]:
    """Those that it hands rows to, or itself."""
    return sink.sinks if isinstance(sink, _SharedSink) else (sink,)


class Store(Protocol):
    """A matrix of outputs held in one precision, however it lies in memory."""

    precision: Precision

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Outputs first.. as they are stored: [n, in] floats, any strides, or int8 with scales.

        Of an [in, out] tensor they have some of their inputs at a time: all from `first_in` on,
        which is a multiple of `ROWS_TOGETHER`, or so many of them.
        """


@runtime_checkable
class Int4Store(Store, Protocol):
    """One that may be in int4."""

    def put_int4(self, first: int, weights: Int4, *, first_in: int = 0) -> None:
        """Outputs first.. that are in four bits already, as `put`, if that is the precision."""


def in_precision(
    precision: Precision, first: int, outputs: HostArray, scales: HostArray | None
) -> Iterator[tuple[int, HostArray, HostArray | None]]:
    """What a store is given, in a precision; piece by piece: the first output, values, scales.

    Of int4 what it means.
    """
    size = max(1, PIECE_BYTES // (FLOAT32.itemsize * outputs.shape[1]))
    for at in range(0, len(outputs), size):
        piece = outputs[at : at + size]
        if scales is not None:
            yield first + at, piece, scales[at : at + size]
        elif precision == "int8":
            yield first + at, *quantise(piece)
        elif precision == "int4":
            yield first + at, dequantise_int4(quantise_int4(piece)), None
        else:
            yield first + at, convert(piece, PRECISIONS[precision]), None


class WeightSink:
    """Outputs first..first+n of a store, from a tensor of floats or one already in int8."""

    is_optional = False

    def __init__(
        self, store: Store, first: int, num_outputs: int, num_in: int, *, is_in_out: bool
    ) -> None:
        self._store = store
        self._first = first
        self.is_in_out = is_in_out
        self.shape = (num_in, num_outputs) if is_in_out else (num_outputs, num_in)
        self.dtypes: Collection[str] = FLOATS
        self.scales: CopySink | None = None
        if store.precision == "int8":
            self.dtypes = (*FLOATS, "I8")
            scales = np.empty((num_outputs, num_groups(num_in)), BFLOAT16)
            self.scales = CopySink(scales, ("BF16",), is_optional=True)
        self._dtype: ArrayDType | None = None
        self._came_before_scales = False

    def turned(self) -> "WeightSink":
        """Of the same outputs of the store, for rows that are the other way round."""
        num_in, num_outputs = self.shape if self.is_in_out else self.shape[::-1]
        return WeightSink(
            self._store, self._first, num_outputs, num_in, is_in_out=not self.is_in_out
        )

    def write(self, first: int, rows: HostArray) -> None:
        """Store the rows: outputs, or inputs of all of them."""
        self._dtype = rows.dtype
        last, scales = first + len(rows), None
        if rows.dtype == INT8:
            assert self.scales is not None, "only int8 stores take int8"
            self._came_before_scales |= not self.scales.is_filled
            scales = self.scales.target
        if not self.is_in_out:
            own = None if scales is None else scales[first:last]
            self._store.put(self._first + first, rows, own)
        else:
            own = None if scales is None else scales[:, first // GROUP : num_groups(last)]
            self._store.put(self._first, rows.T, own, first_in=first)

    @property
    def store(self) -> Store:
        """Where they go."""
        return self._store

    @property
    def precision(self) -> Precision:
        """The store's."""
        return self._store.precision

    @property
    def num_in(self) -> int:
        """Inputs of each output."""
        return self.shape[0] if self.is_in_out else self.shape[1]

    def write_int4(self, first: int, weights: Int4) -> None:
        """The same for an int4 store, of rows in four bits; of inputs all three the other way."""
        assert isinstance(self._store, Int4Store), "its precision says that it is"
        if not self.is_in_out:
            self._store.put_int4(self._first + first, weights)
        else:
            self._store.put_int4(self._first, weights.turned(), first_in=first)

    def problem(self) -> str | None:
        """An int8 tensor without its scales, or scales without one."""
        if self._came_before_scales:
            return "is int8 without scales before it: prepare the shard again"
        has_scales = self.scales is not None and self.scales.is_filled
        if has_scales and self._dtype != INT8:
            return "has scales and is not int8: prepare the shard again"
        return None


def linear_sinks(
    name: str,
    store: Store,
    outputs: range,
    num_in: int,
    bias: Array | None,
    *,
    is_in_out: bool = False,
    fill: Fill = fill_array,
) -> dict[str, Sink]:
    """Sinks of a checkpoint's linear `name`, which gives `outputs` of a store and of its bias."""
    found = weight_sinks(
        f"{name}.weight", store, outputs.start, len(outputs), num_in, is_in_out=is_in_out
    )
    if bias is not None:
        found[f"{name}.bias"] = CopySink(bias[outputs.start : outputs.stop], fill=fill)
    return found


def weight_sinks(
    name: str, store: Store, first: int, num_outputs: int, num_in: int, *, is_in_out: bool = False
) -> dict[str, Sink]:
    """Sinks of the matrix `name` and, where it may come in int8, of its scales."""
    sink = WeightSink(store, first, num_outputs, num_in, is_in_out=is_in_out)
    found: dict[str, Sink] = {name: sink}
    if sink.scales is not None:
        found[name + SCALE_SUFFIX] = sink.scales
    return found
