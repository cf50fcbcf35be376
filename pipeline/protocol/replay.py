"""Which steps a slot's tokens travelled in, so that they can be sent again just so."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from operator import itemgetter

from pipeline.protocol.messages import StepHeader, StepKind
from pipeline.protocol.segments import Segment
from pipeline.protocol.wants import Want

# Stands for the orchestrator where a stage's index is asked for: what comes before stage 0.
ORCHESTRATOR_IDX = -1


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


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """Which stages begin with nothing, and which replay what they sent, until which stage."""

    rebuilt: frozenset[int]
    sources: Mapping[int, int]


def plan_replay(lost: Set[int], keepers: Set[int]) -> ReplayPlan:
    """Rebuild every run of `lost` stages from the one before it.

    One that is not among `keepers` has not kept what it sent, so it is rebuilt as well, from the
    one before it in turn; the orchestrator can always send token ids again.
    """
    rebuilt = set(lost)
    for idx in sorted(lost, reverse=True):
        before = idx - 1
        while before > ORCHESTRATOR_IDX and before not in rebuilt and before not in keepers:
            rebuilt.add(before)
            before -= 1
    sources = {}
    for first in sorted(rebuilt):
        if first - 1 not in rebuilt:
            last = first
            while last + 1 in rebuilt:
                last += 1
            sources[first - 1] = last
    return ReplayPlan(frozenset(rebuilt), sources)
