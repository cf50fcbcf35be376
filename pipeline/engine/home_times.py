"""Where a step's time goes outside the stages, if the orchestrator holds the ends of the model.

By part, in nanoseconds: `embed`, `noise`, `cloak` (rows into their wire format), `seal`, `network`
(from the step's leaving to its result's coming, but for what stages and `open` took), `open`,
`uncloak`, `head` (norm and head) and `sample` (making a token of what the head says).
"""

from time import perf_counter_ns

PARTS = ("embed", "noise", "cloak", "seal", "network", "open", "uncloak", "head", "sample")
Times = dict[str, int]


class Stopwatch:
    """Adds up the parts of one step."""

    def __init__(self) -> None:
        self._times: Times = {}
        self._last = 0

    def start(self) -> None:
        """The next part begins now."""
        self._last = perf_counter_ns()

    def lap(self, part: str) -> None:
        """A part ends now, and the next begins."""
        now = perf_counter_ns()
        self._times[part] = self._times.get(part, 0) + now - self._last
        self._last = now

    def take(self) -> Times:
        """What has added up, which begins anew."""
        times, self._times = self._times, {}
        return times
