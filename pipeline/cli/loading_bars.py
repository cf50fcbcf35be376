"""How far stages that are started here have loaded, on the terminal in front of them."""

from collections.abc import Callable
from contextlib import ExitStack

import trio

from pipeline.cli.progress import progress_rows
from pipeline.placement.base import Placement
from pipeline.progress import Progress

# Between two looks at what workers have told, which they do about as often.
PAUSE_SECONDS = 0.2


class LoadingBars:
    """A bar for each stage, from when one of them tells that it reads its weights."""

    def __init__(self, placement: Placement, num_stages: int) -> None:
        self._placement = placement
        self._num_stages = num_stages
        self._bars = ExitStack()
        self._row_of: Callable[[int], Progress | None] | None = None
        self._looking = trio.CancelScope()

    async def follow(self) -> None:
        """Draw how far they are until `end`."""
        with self._looking, self._bars:
            while True:
                await trio.sleep(PAUSE_SECONDS)
                for stage_idx in range(self._num_stages):
                    self._look(stage_idx)

    def end(self) -> None:
        """Draw nothing from now on: text may follow."""
        self._looking.cancel()
        self._bars.close()

    def _look(self, stage_idx: int) -> None:
        found = self._placement.progress(stage_idx)
        if found is None or found.loaded is None:
            return
        if self._row_of is None:
            names = [f"loading stage {idx}" for idx in range(self._num_stages)]
            self._row_of = self._bars.enter_context(progress_rows(names))
        row = self._row_of(stage_idx)
        if row is not None:
            row(*found.loaded)
