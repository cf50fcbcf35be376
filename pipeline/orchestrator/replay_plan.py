"""After a loss: which stages begin with nothing, and who replays to them what they held."""

from collections.abc import Mapping, Set

from transport.frozen import frozen

# Stands for the orchestrator where a stage's index is asked for: what comes before stage 0.
ORCHESTRATOR_IDX = -1


@frozen
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
