"""Which steps a slot's tokens travelled in, so that they can be sent again just so."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind


@dataclass(frozen=True, slots=True)
class SlotPart:
    """A slot's part of one step."""

    step: int
    # Which of the step's segments it was.
    index: int
    position: int
    num_tokens: int

    @property
    def end(self) -> int:
        """The position behind its last token."""
        return self.position + self.num_tokens


def truncate(pieces: list[SlotPart], length: int) -> None:
    """Forget what lies at or behind position `length`."""
    while pieces and pieces[-1].end > length:
        last = pieces.pop()
        if last.position < length:
            pieces.append(replace(last, num_tokens=length - last.position))


def replay_headers(slots: Mapping[int, Sequence[SlotPart]], until: int) -> Iterator[StepHeader]:
    """The steps that these slots' pieces came in, in their old order and grouping.

    KV state computed from them is the lost one's equal, bit for bit unless requests of those steps
    have ended: with some kernels, steps of other sizes round otherwise.
    """
    steps: defaultdict[int, list[tuple[int, Segment]]] = defaultdict(list)
    for slot, pieces in slots.items():
        for piece in pieces:
            segment = Segment(slot, piece.position, piece.num_tokens)
            steps[piece.step].append((piece.index, segment))
    for step in sorted(steps):
        ordered = sorted(steps[step], key=itemgetter(0))
        segments = tuple(segment for _, segment in ordered)
        wants = (Want.NOTHING,) * len(segments)
        yield StepHeader(StepKind.REPLAY, step, segments, wants, until=until)
