"""Hidden states of many candidates for the next token, given the tokens before it.

Candidates are rows of one batch, each in a KV slot of its own. A slot keeps the prefix that it has
seen, so that from position to position only what is new of it is computed again.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.dtypes import Floats
from pipeline.leakage.public_model import PublicModel, forward
from pipeline.protocol.batch import Segment


class CandidateStates:
    """Rows at one layer, at most `num_slots` candidates at a time."""

    def __init__(self, model: PublicModel, layer: int, num_slots: int, num_positions: int) -> None:
        self._model = model
        self._shards = model.shards[: model.cuts.index(layer)]
        self._caches = [shard.new_cache(num_slots, num_positions) for shard in self._shards]
        self._held: list[tuple[int, ...]] = [()] * num_slots

    def rows(self, prefix: Sequence[int], candidates: Sequence[int]) -> Floats:
        """Row of each candidate behind `prefix`: [candidates, hidden]."""
        num_slots = len(self._held)
        parts = [
            self._part(tuple(prefix), candidates[first : first + num_slots])
            for first in range(0, len(candidates), num_slots)
        ]
        return np.concatenate(parts)

    def _part(self, prefix: tuple[int, ...], candidates: Sequence[int]) -> Floats:
        batch, inputs = [], []
        for slot, candidate in enumerate(candidates):
            kept = _common(self._held[slot], prefix)
            for cache in self._caches:
                cache.truncate(slot, kept)
            new = (*prefix[kept:], candidate)
            batch.append(Segment(slot, kept, len(new)))
            inputs.append(self._model.embed(new, kept))
            self._held[slot] = (*prefix, candidate)
        rows = np.concatenate(inputs)
        for shard, cache in zip(self._shards, self._caches, strict=True):
            rows = forward(shard, rows, batch, cache)
        last: Floats = rows[np.cumsum([segment.num_tokens for segment in batch]) - 1]
        return last


def _common(held: Sequence[int], prefix: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for mine, other in zip(held, prefix, strict=False):
        if mine != other:
            break
        count += 1
    return count
