"""What a stage has sent to the next one for live slots, kept in case that one is replaced."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.protocol.batch import Batch
from pipeline.protocol.replay_history import SlotPart, replay_headers, truncate
from pipeline.protocol.step_header import StepHeader


class ActivationLog:
    """One row per token of each slot, float32 [slots, max_seq, hidden].

    The memory is reserved, not touched: the operating system hands out pages as slots fill.
    """

    def __init__(self, num_slots: int, max_seq_len: int, hidden_dim: int) -> None:
        self._rows = np.zeros((num_slots, max_seq_len, hidden_dim), dtype=np.float32)
        self._pieces: list[list[SlotPart]] = [[] for _ in range(num_slots)]

    @property
    def num_bytes(self) -> int:
        """Bytes reserved, whether touched yet or not."""
        return self._rows.nbytes

    def append(self, step: int, batch: Batch, hidden: npt.NDArray[np.float32]) -> None:
        """Keep a step's output, [rows, hidden]; rows follow each other as the segments do."""
        start = 0
        for index, segment in enumerate(batch):
            piece = SlotPart(step, index, segment.position, segment.num_tokens)
            rows = hidden[start : start + segment.num_tokens]
            self._rows[segment.slot, piece.position : piece.end] = rows
            self._pieces[segment.slot].append(piece)
            start += segment.num_tokens

    def truncate(self, slot: int, length: int) -> None:
        """Keep a slot's first `length` tokens; what lies behind them is zeroed."""
        pieces = self._pieces[slot]
        if pieces:
            self._rows[slot, length : pieces[-1].end] = 0
        truncate(pieces, length)

    def clear(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self.truncate(slot, 0)

    def release(self) -> None:
        """Zero what was used and give the memory back at once, whoever still refers to this."""
        self.clear(range(len(self._pieces)))
        self._rows = np.empty((0, 0, 0), dtype=np.float32)

    def copy(self, step: int, source: int, target: int, length: int) -> None:
        """Keep of an empty slot what is kept of the first `length` tokens of another.

        It is replayed as a step of its own: whoever has it copied no longer needs the other.
        """
        self._rows[target, :length] = self._rows[source, :length]
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


def log_bytes(num_slots: int, max_seq_len: int, hidden_dim: int) -> int:
    """What such a log would reserve."""
    return num_slots * max_seq_len * hidden_dim * np.dtype(np.float32).itemsize
