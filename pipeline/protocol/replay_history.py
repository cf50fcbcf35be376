"""Which steps a slot's tokens travelled in, so that they can be sent again just so."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from transport.frozen import frozen


@frozen
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


def replay_headers(
    slots: Mapping[int, Sequence[SlotPart]], until: int, max_tokens: int
) -> Iterator[StepHeader]:
    """The steps that these slots' pieces came in, in their old order and grouping.

    KV state computed from them is the lost one's equal, bit for bit unless requests of those steps
    have ended: with some kernels, steps of other sizes round otherwise. What was copied is computed
    in steps of `max_tokens` at most; it is only where sizes change nothing.
    """
    steps: defaultdict[int, list[tuple[int, Segment]]] = defaultdict(list)
    # A slot's parts of one step stay in the order of their positions.
    places: dict[tuple[int, int], int] = {}
    for slot, pieces in slots.items():
        for piece in pieces:
            place = places.setdefault((piece.step, slot), piece.index)
            for start in range(piece.position, piece.end, max_tokens):
                segment = Segment(slot, start, min(max_tokens, piece.end - start))
                steps[piece.step].append((place, segment))
    for step in sorted(steps):
        ordered = [segment for _, segment in sorted(steps[step], key=itemgetter(0))]
        for segments in _fitting(ordered, max_tokens):
            wants = (Want.NOTHING,) * len(segments)
            yield StepHeader(StepKind.REPLAY, step, segments, wants, until=until)


def _fitting(ordered: Iterable[Segment], max_tokens: int) -> Iterator[tuple[Segment, ...]]:
    """Runs of segments that a step can hold: so many tokens, and no slot twice."""
    run: list[Segment] = []
    num_left, slots = max_tokens, set[int]()
    for segment in ordered:
        if run and (segment.slot in slots or segment.num_tokens > num_left):
            yield tuple(run)
            run, num_left, slots = [], max_tokens, set()
        run.append(segment)
        slots.add(segment.slot)
        num_left -= segment.num_tokens
    yield tuple(run)
