"""What a stage has sent to the next one for live slots, kept in case that one is replaced.

It gives way to keys and values: what is forgotten of a slot is not kept again before that is empty.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import FLOAT32
from pipeline.kernels.huge_pages import give_back, reserve
from pipeline.protocol.batch import Batch
from pipeline.protocol.replay_history import SlotPart, replay_headers, truncate
from pipeline.protocol.step_header import StepHeader


class ActivationLog:
    """One row per token of each slot, float32 [slots, max_seq, hidden].

    The memory is reserved, not touched: the operating system hands out pages as slots fill, and
    takes them back.
    """

    def __init__(self, num_slots: int, max_seq_len: int, hidden_dim: int) -> None:
        self._rows = reserve((num_slots, max_seq_len, hidden_dim), FLOAT32)
        self._pieces: list[list[SlotPart]] = [[] for _ in range(num_slots)]
        self._num_rows = 0

    @property
    def num_bytes(self) -> int:
        """Bytes reserved, whether touched yet or not."""
        return self._rows.nbytes

    @property
    def num_kept_bytes(self) -> int:
        """Bytes of what is kept now."""
        return int(self._num_rows * self._rows.shape[2] * self._rows.itemsize)

    def is_whole(self, lengths: Sequence[int]) -> bool:
        """Whether all is kept of slots that hold so many tokens."""
        return all(self._length(slot) == length for slot, length in enumerate(lengths))

    def _length(self, slot: int) -> int:
        pieces = self._pieces[slot]
        return pieces[-1].end if pieces else 0

    def append(self, step: int, batch: Batch, hidden: npt.NDArray[np.float32]) -> None:
        """Keep a step's output, [rows, hidden]; rows follow each other as the segments do."""
        start = 0
        for index, segment in enumerate(batch):
            piece = SlotPart(step, index, segment.position, segment.num_tokens)
            if piece.position == self._length(segment.slot):  # else its beginning is forgotten
                rows = hidden[start : start + segment.num_tokens]
                self._rows[segment.slot, piece.position : piece.end] = rows
                self._pieces[segment.slot].append(piece)
                self._num_rows += segment.num_tokens
            start += segment.num_tokens

    def truncate(self, slot: int, length: int) -> None:
        """Keep a slot's first `length` tokens; what lies behind them is zeroed."""
        behind = self._rows[slot, length : self._length(slot)]
        self._num_rows -= len(behind)
        behind[:] = 0
        give_back(behind)
        truncate(self._pieces[slot], length)

    def clear(self, slots: Sequence[int] | None = None) -> None:
        """Forget these slots, all by default."""
        for slot in range(len(self._pieces)) if slots is None else slots:
            self.truncate(slot, 0)

    def release(self) -> None:
        """Zero what was used and give the memory back at once, whoever still refers to this."""
        self.clear()
        self._rows = np.empty((0, 0, 0), dtype=np.float32)

    def copy(self, step: int, source: int, target: int, length: int) -> None:
        """Keep of an empty slot what is kept of the first `length` tokens of another.

        It is replayed as a step of its own: whoever has it copied no longer needs the other.
        """
        if self._length(source) < length:
            return
        self._rows[target, :length] = self._rows[source, :length]
        self._num_rows += length
        self._pieces[target] = [SlotPart(step, target, 0, length)]

    def replay(
        self, until: int, max_tokens: int
    ) -> Iterator[tuple[StepHeader, npt.NDArray[np.float32]]]:
        """All that is kept, as steps for the stages behind, up to `until`: [rows, hidden] each.

        A step takes `max_tokens` at most.
        """
        for header in replay_headers(dict(enumerate(self._pieces)), until, max_tokens):
            rows = [
                self._rows[segment.slot, segment.position : segment.position + segment.num_tokens]
                for segment in header.segments
            ]
            yield header, np.concatenate(rows)
