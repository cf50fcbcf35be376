"""Whose turn it is, where several clients want more than there is: each gets as much as any other.

Who is alone gets all. Otherwise nobody has to wait because another has asked for a lot.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import attrgetter

from pipeline.engine.request import RequestState


class WaitingLine:
    """Requests that wait, each client's in a line of its own.

    Ordered, so that taking the first and leaving cost the same for all.
    """

    def __init__(self) -> None:
        self._states: dict[int, RequestState] = {}
        self._lines: dict[bytes | None, OrderedDict[int, RequestState]] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._states

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._states.values())

    def get(self, request_id: int) -> RequestState | None:
        """The one of this number, if it waits."""
        return self._states.get(request_id)

    def add(self, state: RequestState, *, is_first: bool = False) -> None:
        """Have one wait behind all others of its client, or before them."""
        request_id = state.request.request_id
        self._states[request_id] = state
        line = self._lines.setdefault(state.request.client, OrderedDict())
        line[request_id] = state
        line.move_to_end(request_id, last=not is_first)

    def remove(self, request_id: int) -> None:
        """Have it wait no more, if it does."""
        state = self._states.pop(request_id, None)
        if state is not None:
            line = self._lines[state.request.client]
            del line[request_id]
            if not line:
                del self._lines[state.request.client]

    def first(self, running: Iterable[RequestState]) -> RequestState:
        """Whose turn it is, if any waits: of the client with the fewest requests that run."""
        counts = _counts(running)
        heads = (next(iter(line.values())) for line in self._lines.values())
        return min(heads, key=lambda state: (counts[state.request.client], state.arrival))


def first_to_give_way(running: Collection[RequestState]) -> RequestState | None:
    """The last to come, of the client with the most requests that run.

    None that is just being loaded: its slot cannot be cleared.
    """
    counts = _counts(running)
    may_go = [state for state in running if not state.num_loading]
    return max(
        may_go, key=lambda state: (counts[state.request.client], state.arrival), default=None
    )


def owes_a_slot(
    next_one: RequestState, running: Collection[RequestState], num_slots: int
) -> RequestState | None:
    """Who is to give way to one that waits, because its client has less than its share."""
    counts = _counts(running)
    own = counts[next_one.request.client]
    share = num_slots // len(counts.keys() | {next_one.request.client})
    state = first_to_give_way(running)
    if state is None or own >= share or counts[state.request.client] <= max(share, own + 1):
        return None
    return state


def shared_rows(
    decoding: Sequence[RequestState], num_stages: int, least: int
) -> tuple[list[RequestState], int]:
    """Who may take part in the next step, and how many such steps make one of all.

    As many as spread them over the stages, and `least` at least.

    No client has more rows under way at once than its share of all requests that are answered:
    steps of fewer rows come back sooner, so that who has one request is not slowed down by all.
    """
    if len({state.request.client for state in decoding}) <= 1:  # as nearly always
        most = max(least, -(-len(decoding) // num_stages))
        ready = [state for state in decoding if state.num_sent < state.num_known][:most]
        return ready, -(-len(decoding) // most)
    counts = _counts(decoding)
    share = -(-len(decoding) // max(1, len(counts)))
    num_rows = sum(min(count, share) for count in counts.values())
    left = Counter(dict.fromkeys(counts, share))
    left.subtract(state.request.client for state in decoding if state.num_sent == state.num_known)
    ready = []
    for state in decoding:
        if state.num_sent < state.num_known and left[state.request.client] > 0:
            left[state.request.client] -= 1
            ready.append(state)
    most = max(least, -(-num_rows // num_stages))
    return ready[:most], -(-num_rows // most)


def _counts(states: Iterable[RequestState]) -> Counter[bytes | None]:
    return Counter(map(attrgetter("request.client"), states))
