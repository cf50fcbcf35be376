"""Steps that kernels have recorded over a cache: they refer to its memory and end with it."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Step = TypeVar("Step")

# Each has buffers of its own.
MAX_RECORDINGS = 32


class Recordings:
    """What has been recorded, by what it is for; beyond MAX_RECORDINGS the oldest goes."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: dict[Hashable, Any] = {}

    def get(self, key: Hashable, record: Callable[[], Step]) -> Step:
        """What is recorded for `key`, or is now."""
        step: Step | None = self._steps.get(key)
        if step is None:
            if len(self._steps) == MAX_RECORDINGS:
                del self._steps[next(iter(self._steps))]
            step = self._steps[key] = record()
        return step

    def __getitem__(self, key: Hashable) -> Any:  # noqa: ANN401 - whatever kernels record
        """What is recorded for `key`. Raises KeyError."""
        return self._steps[key]

    def keys(self) -> set[Hashable]:
        """What there are recordings for."""
        return set(self._steps)

    def clear(self) -> None:
        """Let go of all."""
        self._steps.clear()
