"""Replayed steps put together: the same KV state from a few large steps."""

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.dtypes import Floats, HostArray
from pipeline.errors import MessageError
from pipeline.protocol.batch import Segment
from pipeline.protocol.step_header import StepHeader


class CatchUp:
    """Steps that wait to be computed as one. Exact only where rows do not depend on each other."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._steps: list[tuple[StepHeader, HostArray]] = []
        # Per slot: the position behind its last row, and which rows of all steps are its own.
        self._ends: dict[int, int] = {}
        self._rows: dict[int, list[int]] = {}
        self._num_tokens = 0

    def has_room(self, header: StepHeader) -> bool:
        """Whether a step may still be added."""
        return self._num_tokens + header.num_tokens <= self._max_tokens

    def add(self, header: StepHeader, inputs: HostArray, lengths: Sequence[int]) -> None:
        """Put off a step; `lengths` is what slots hold. Raises MessageError unless it continues it.

        Without that check one step too few would go unnoticed once they are put together.
        """
        for segment in header.segments:
            held = self._ends.get(segment.slot, lengths[segment.slot])
            if segment.position != held:
                raise MessageError(
                    f"slot {segment.slot} holds {held} tokens, "
                    f"but the replayed step is at {segment.position}"
                )
            self._ends[segment.slot] = held + segment.num_tokens
            rows = range(self._num_tokens, self._num_tokens + segment.num_tokens)
            self._rows.setdefault(segment.slot, []).extend(rows)
            self._num_tokens += segment.num_tokens
        self._steps.append((header, inputs.copy()))  # a view of what the next frame overwrites

    def merged(self) -> tuple[tuple[Segment, ...], HostArray]:
        """One segment for each slot, and the inputs in that order, [rows] or [rows, hidden]."""
        segments = tuple(
            Segment(slot, self._ends[slot] - len(rows), len(rows))
            for slot, rows in self._rows.items()
        )
        return segments, np.concatenate([inputs for _, inputs in self._steps])[self._order()]

    def split(self, hidden: Floats) -> Iterator[tuple[StepHeader, Floats]]:
        """Each step's part of the merged outputs, [rows, hidden]."""
        arrived = np.empty_like(hidden)
        arrived[self._order()] = hidden
        start = 0
        for header, _ in self._steps:
            yield header, arrived[start : start + header.num_tokens]
            start += header.num_tokens

    def __bool__(self) -> bool:
        return bool(self._steps)

    def _order(self) -> HostArray:
        return np.array([row for rows in self._rows.values() for row in rows])
