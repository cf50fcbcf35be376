"""An attacker at work: the public model, and what is computed with it once for all attacks."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from pipeline.dtypes import Floats
from pipeline.leakage.attacks.gram_matching import GramComparison, match_gram
from pipeline.leakage.candidate_states import CandidateStates
from pipeline.leakage.evidence import Comparison, Features, RowByRow
from pipeline.leakage.matching import Candidates, Propose, match_text, nearest
from pipeline.leakage.next_tokens import MAX_CANDIDATES, NextTokens
from pipeline.leakage.public_model import PublicModel, without_mean

# Slots for candidates, by how much KV memory one takes: few layers, many.
SHALLOW, SHALLOW_SLOTS, DEEP_SLOTS = 2, 512, 64
# Candidates are computed so many at a time, at first; mostly one of these fits.
FIRST_TRIED, THEN_TRIED = 8, 64
# Of the whole vocabulary at layer 1, so many are computed with their prefix at first: those nearest
# without one, and as many that a language model expects. Measured: 93 % are among the first 8.
SHORTLIST = 512
# Parts of candidates whose rows are kept: attacks at one layer mostly ask for the same.
KEPT_PARTS = 512

RowsOf = Callable[[tuple[int, ...], tuple[int, ...]], Floats]  # behind a prefix, of candidates


class Attacker:
    """Turns comparisons into tokens, whatever they compare."""

    def __init__(self, model: PublicModel, num_tokens: int) -> None:
        self._model = model
        self._size = model.config.vocab_size
        self._num_positions = num_tokens + 1
        self._next_tokens = NextTokens(model, self._num_positions)
        # The last ones: one attack after another is tried on all texts, layer by layer.
        self._rows_of = lru_cache(maxsize=1)(self._new_rows_of)
        self._features = lru_cache(maxsize=1)(self._vocabulary_features)
        self._features_alone = lru_cache(maxsize=1)(self._new_features_alone)
        self._rows_alone = lru_cache(maxsize=1)(self._new_rows_alone)

    def recover(
        self,
        comparison: Comparison,
        layer: int,
        num_tokens: int,
        known_ids: Sequence[int] = (),
        *,
        is_guided: bool = False,
    ) -> Sequence[int]:
        """Tokens of a text, those known in advance included.

        `is_guided`: candidates by a language model even where the whole vocabulary can be tried.
        """
        if layer == 0 and not is_guided:
            return [*known_ids, *self._match_all(comparison)[len(known_ids) :]]
        is_shortlisted = layer == 1 and not is_guided
        rows_of = self._rows_of(layer)
        return match_text(
            comparison,
            known_ids,
            num_tokens,
            self._shortlisted(layer) if is_shortlisted else self._guided(layer),
            lambda prefix, ids: rows_of(tuple(prefix), tuple(ids)),
        )

    def present(self, comparison: Comparison, count: int) -> frozenset[int]:
        """So many tokens of which the rows at layer 0 fit best, wherever they stand."""
        target, features = comparison.at(0, {})
        off = np.square(features(self._vocabulary(0)) - target).sum(axis=1)
        return frozenset(np.argsort(off, kind="stable")[:count].tolist())

    def considered(self, layer: int, *, is_guided: bool = False) -> str:
        """Which tokens are tried at a layer, in words."""
        if layer == 0 or (layer == 1 and not is_guided):
            return "all"
        return f"{min(MAX_CANDIDATES, self._size)} likeliest"

    def _match_all(self, comparison: Comparison) -> Sequence[int]:
        """At layer 0 every token's row is known, whatever came before it."""
        if isinstance(comparison, GramComparison):
            return list(match_gram(comparison.observed, self._vocabulary).tolist())
        assert isinstance(comparison, RowByRow), "there are no others"
        if self._model.positions is None:
            table = self._features(comparison.features, 0)
            return list(nearest(comparison.observed, table).tolist())
        return [
            int(nearest(row[None], self._features(comparison.features, position))[0])
            for position, row in enumerate(comparison.observed)
        ]

    def _guided(self, layer: int) -> Propose:
        """What a language model expects; at layer 0, where rows cost nothing, all there is."""
        count = self._size if layer == 0 else min(MAX_CANDIDATES, self._size)

        def propose(
            prefix: Sequence[int], target: Floats, features: Features, *, is_sure: bool
        ) -> Iterator[Candidates]:
            del target, features, is_sure
            expected = self._next_tokens.likeliest(tuple(prefix), count)
            yield expected.part(0, FIRST_TRIED)
            yield expected.part(FIRST_TRIED, THEN_TRIED)
            yield expected.part(THEN_TRIED)

        return propose

    def _shortlisted(self, layer: int) -> Propose:
        """The whole vocabulary, ordered by rows computed without what came before."""

        def propose(
            prefix: Sequence[int], target: Floats, features: Features, *, is_sure: bool
        ) -> Iterator[Candidates]:
            table, squares = self._features_alone(features, layer)
            off = squares - 2 * (table @ target)
            count = min(SHORTLIST, MAX_CANDIDATES, self._size)
            ids = np.argpartition(off, count - 1)[:count]
            ids = ids[np.argsort(off[ids], kind="stable")]
            yield Candidates(ids[:FIRST_TRIED])
            expected = self._next_tokens.likeliest(tuple(prefix), count).ids
            rest = expected[~np.isin(expected, ids[:FIRST_TRIED])]
            yield Candidates(rest[:THEN_TRIED])
            yield Candidates(rest[THEN_TRIED:])
            yield Candidates(np.setdiff1d(ids[FIRST_TRIED:], expected))
            if is_sure:  # else rows are off by the wrong tokens before, and none will fit
                yield Candidates(np.setdiff1d(np.arange(self._size), np.append(ids, expected)))

        return propose

    def _vocabulary(self, position: int) -> Floats:
        return self._as_compared(self._model.vocabulary(position))

    def _vocabulary_features(self, features: Features, position: int) -> Floats:
        return features(self._vocabulary(position))

    def _new_features_alone(self, features: Features, layer: int) -> tuple[Floats, Floats]:
        """Features of every token without what came before, and their squared lengths."""
        table = features(self._rows_alone(layer))
        return table, np.square(table).sum(axis=1)

    def _new_rows_alone(self, layer: int) -> Floats:
        return self._as_compared(self._new_states(layer).rows((), range(self._size)))

    def _new_states(self, layer: int) -> CandidateStates:
        slots = SHALLOW_SLOTS if layer <= SHALLOW else DEEP_SLOTS
        return CandidateStates(self._model, layer, slots, self._num_positions)

    def _new_rows_of(self, layer: int) -> RowsOf:
        if layer == 0:
            return lambda prefix, ids: self._vocabulary(len(prefix))[list(ids)]
        states = self._new_states(layer)

        def compute(prefix: tuple[int, ...], ids: tuple[int, ...]) -> Floats:
            return self._as_compared(states.rows(prefix, ids))

        kept = lru_cache(maxsize=KEPT_PARTS)(compute)
        return lambda prefix, ids: (kept if len(ids) <= SHORTLIST else compute)(prefix, ids)

    def _as_compared(self, rows: Floats) -> Floats:
        """Without the mean, where the model's norms drop it: see `observations`."""
        return without_mean(rows) if self._model.is_centred else rows
