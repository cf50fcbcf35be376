"""Requests that may be what breaks the stages."""

from collections import Counter
from collections.abc import Collection, Iterable

# A request whose steps have been lost so often in a row may be what breaks the stages: it travels
# alone from then on. One that is lost even so is given up, or nobody would ever go on.
SUSPECT_LOSSES = 2
MAX_LOSSES = 4


class Suspects:
    """How often in a row requests' steps have been lost."""

    def __init__(self) -> None:
        self._losses: Counter[int] = Counter()

    def lose(self, request_id: int) -> bool:
        """Count a loss; whether that has been too many."""
        self._losses[request_id] += 1
        return self._losses[request_id] >= MAX_LOSSES

    def clear(self, request_ids: Iterable[int]) -> None:
        """A step of these came back, or they are gone."""
        if self._losses:  # most of the time there are none
            for request_id in request_ids:
                del self._losses[request_id]  # a Counter does not mind one it has not

    def alone(self, running: Collection[int]) -> int | None:
        """Which of these has to travel alone, if any has."""
        if not self._losses:
            return None
        suspects = (each for each, count in self._losses.items() if count >= SUSPECT_LOSSES)
        return next((each for each in suspects if each in running), None)
