"""Tensors that hold a matrix, or a bias, of each of many linears, one behind another.

A linear may be made of several parts, such as gates and ups: then a stack has their outputs in
turn, the first of each part before the second of any.
"""

from collections.abc import Collection, Sequence

import numpy as np

from pipeline.dtypes import HostArray
from pipeline.weights.tensor_sinks import FLOATS, CopySink, Sink, WeightSink


class StackSink:
    """Takes matrices [n, in, out], or [n, out, in], for the parts of each of n linears."""

    is_optional = False

    def __init__(self, linears: Sequence[Sequence[WeightSink]]) -> None:
        """All parts alike, and all take [in, out], or all [out, in]."""
        self._linears = linears
        first, self._num_parts = linears[0][0], len(linears[0])
        self.is_in_out, self.precision = first.is_in_out, first.precision
        rows, columns = first.shape
        if self.is_in_out:
            self.shape: tuple[int, ...] = (len(linears), rows, columns * self._num_parts)
        else:
            self.shape = (len(linears), rows * self._num_parts, columns)
        self.dtypes: Collection[str] = FLOATS

    @classmethod
    def of(cls, linears: Sequence[Sequence[Sink]]) -> "StackSink":
        """Of what linears say that their weights go to."""
        found: list[list[WeightSink]] = []
        for parts in linears:
            found.append([])
            for part in parts:
                assert isinstance(part, WeightSink), "nothing else takes a linear's weights"
                found[-1].append(part)
        return cls(found)

    def turned(self) -> "StackSink":
        """Of the same linears, for rows that are the other way round."""
        return StackSink([[part.turned() for part in parts] for parts in self._linears])

    def write(self, first: int, rows: HostArray) -> None:
        """Take rows of one matrix, counted from the first of the first."""
        linear, at = divmod(first, self.shape[1])
        count = self._num_parts
        for index, part in enumerate(self._linears[linear]):
            if self.is_in_out:
                part.write(at, rows[:, index::count])
            else:
                part.write(at // count, rows[index::count])

    def problem(self) -> str | None:
        """That of any part."""
        return next(filter(None, (each.problem() for own in self._linears for each in own)), None)


class BiasStackSink:
    """Takes biases [n, out] for the parts of each of n linears."""

    is_optional = False

    def __init__(self, linears: Sequence[Sequence[Sink]]) -> None:
        self._linears = linears
        self.shape = (len(linears), sum(part.shape[0] for part in linears[0]))
        self.dtypes: Collection[str] = FLOATS

    def write(self, first: int, rows: HostArray) -> None:
        """Take those of some linears."""
        for parts, row in zip(self._linears[first:], rows, strict=False):
            for index, part in enumerate(parts):
                part.write(0, np.ascontiguousarray(row[index :: len(parts)]))

    def problem(self) -> str | None:
        """Nothing can be."""
        return None


# What a matrix, or a stack of them, goes to.
MatrixSink = WeightSink | CopySink | StackSink
