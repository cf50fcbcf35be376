"""Every attack that fits a mode, on every text, at every layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.dtypes import Floats
from pipeline.leakage.attacks.gram_matching import gram_matching, match_gram
from pipeline.leakage.attacks.known_prefix import known_prefix
from pipeline.leakage.attacks.known_weights import known_weights
from pipeline.leakage.attacks.many_sessions import averaged_noise, shared_secret
from pipeline.leakage.attacks.nearest_vocabulary import nearest_vocabulary
from pipeline.leakage.attacks.sorted_matching import sorted_matching
from pipeline.leakage.candidate_states import CandidateStates
from pipeline.leakage.cards import Recovery
from pipeline.leakage.evidence import Attack, Comparison, Features, RowByRow
from pipeline.leakage.matching import Proposal, Propose, match_text, nearest
from pipeline.leakage.modes import Mode
from pipeline.leakage.next_tokens import MAX_CANDIDATES, NextTokens
from pipeline.leakage.observations import Observations
from pipeline.leakage.public_model import PublicModel, without_mean
from pipeline.progress import Progress

# Slots for candidates, by how much KV memory one takes: few layers, many.
SHALLOW, SHALLOW_SLOTS, DEEP_SLOTS = 2, 512, 64
# Of the whole vocabulary at layer 1, so many are computed with their prefix: those that are nearest
# without one.
SHORTLIST = 512
# Parts of candidates whose rows are kept: attacks at one layer mostly ask for the same.
KEPT_PARTS = 512


Fits = Callable[[Mode, int], bool]


@dataclass(frozen=True, slots=True)
class NamedAttack:
    """An attack, what it needs beside the observations, and at which layers of a mode it is tried.

    What fails against a secret at layer 0 is not tried at others, where failing takes hours.
    """

    name: str
    attacker: str
    attack: Attack
    fits: Fits
    num_known: int = 0
    is_guided: bool = False  # candidates by a language model even where all could be tried


def _vocabulary_fits(mode: Mode, layer: int) -> bool:
    return layer == 0 if mode.secret else layer <= 1


def _guided_fits(mode: Mode, layer: int) -> bool:
    return mode.secret is None and layer != 1


def _sorted_fits(mode: Mode, layer: int) -> bool:
    return mode.secret == "permutation" or (mode.secret is not None and layer == 0)


def _secret(mode: Mode, layer: int) -> bool:
    del layer
    return mode.secret is not None


def _shallow_secret(mode: Mode, layer: int) -> bool:
    return mode.secret is not None and layer <= 1


def _sent_noise(mode: Mode, layer: int) -> bool:
    return mode.has_noise and layer == 0


PUBLIC = "public W"
SESSIONS = "many-sessions", f"{PUBLIC} + many sessions"
ATTACKS = (
    NamedAttack("nearest-vocabulary", PUBLIC, nearest_vocabulary, _vocabulary_fits),
    NamedAttack("language-model-guided", PUBLIC, nearest_vocabulary, _guided_fits, is_guided=True),
    NamedAttack("sorted-matching", PUBLIC, sorted_matching, _sorted_fits),
    NamedAttack("gram-matching", PUBLIC, gram_matching, _secret),
    *(
        NamedAttack(
            f"known-prefix-{count}",
            f"{PUBLIC} + {count} known tokens",
            known_prefix,
            _shallow_secret,
            num_known=count,
        )
        for count in (8, 32)
    ),
    NamedAttack("known-weights", f"{PUBLIC} + W'", known_weights, _secret),
    NamedAttack(*SESSIONS, shared_secret, _secret),
    NamedAttack(*SESSIONS, averaged_noise, _sent_noise),
)


RowsOf = Callable[[tuple[int, ...], tuple[int, ...]], Floats]  # behind a prefix, of candidates


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is attacked: deep layers on few texts only."""

    num_texts: int = 20
    num_tokens: int = 64
    num_deep_texts: int = 2
    layers: tuple[int, ...] | None = None  # None: 0, 1, the middle and the last

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose input is looked at."""
        return self.layers or tuple(sorted({0, 1, num_layers // 2, num_layers - 1}))

    def texts_at(self, layer: int) -> range:
        """Which texts are attacked at a layer."""
        return range(self.num_texts if layer <= 1 else min(self.num_texts, self.num_deep_texts))


class Attacker:
    """The public model, and what is computed with it once for all attacks."""

    def __init__(self, model: PublicModel, num_tokens: int) -> None:
        self._model = model
        self._num_positions = num_tokens + 1
        self._next_tokens = NextTokens(model, self._num_positions)
        # The last ones: one attack after another is tried on all texts.
        self._rows_of = lru_cache(maxsize=1)(self._new_rows_of)
        self._features = lru_cache(maxsize=1)(self._vocabulary_features)
        self._alone = lru_cache(maxsize=1)(self._features_alone)
        self._rows_alone = lru_cache(maxsize=1)(self._all_rows_alone)

    def recover(
        self, each: NamedAttack, seen: Observations, index: int, layer: int
    ) -> tuple[Sequence[int], str]:
        """Tokens of a text, those known in advance included, and which ones were considered."""
        evidence = seen.evidence(index, layer, each.num_known)
        comparison = each.attack(evidence)
        known = seen.texts[index][: each.num_known]
        if layer == 0 and not each.is_guided:
            return self._match_all(comparison, known), "all"
        is_guided = each.is_guided or layer > 1 or not isinstance(comparison, RowByRow)
        rows_of = self._rows_of(layer)
        found = match_text(
            comparison,
            known,
            len(evidence.observed),
            self._guided(layer) if is_guided else self._shortlisted(layer),
            lambda prefix, ids: rows_of(tuple(prefix), tuple(ids)),
            self._model.config.hidden_dim,
        )
        is_limited = is_guided and layer > 0
        return found, f"{MAX_CANDIDATES} likeliest" if is_limited else "all"

    def _match_all(self, comparison: Comparison, known: Sequence[int]) -> Sequence[int]:
        """At layer 0 every token's row is known, whatever came before it."""
        if not isinstance(comparison, RowByRow):
            return match_gram(comparison.observed, self._vocabulary).tolist()
        if self._model.positions is None:
            table = self._features(comparison.features, 0)
            found = nearest(comparison.observed, table).tolist()
        else:
            found = [
                int(nearest(row[None], self._features(comparison.features, position))[0])
                for position, row in enumerate(comparison.observed)
            ]
        return [*known, *found[len(known) :]]

    def _guided(self, layer: int) -> Propose:
        """What a language model expects; at layer 0, where that costs nothing, in all its order."""
        size = self._model.config.vocab_size
        count = size if layer == 0 else min(MAX_CANDIDATES, size)

        def propose(prefix: Sequence[int], target: Floats, features: Features) -> Proposal:
            del target, features
            return self._next_tokens.likeliest(tuple(prefix), count)

        return propose

    def _shortlisted(self, layer: int) -> Propose:
        """The whole vocabulary, ordered by rows computed without what came before."""

        def propose(prefix: Sequence[int], target: Floats, features: Features) -> Proposal:
            del prefix
            table, squares = self._alone(features, layer)
            off = squares - 2 * (table @ target)
            count = min(SHORTLIST, len(off))
            ids = np.argpartition(off, count - 1)[:count]
            return Proposal(ids[np.argsort(off[ids], kind="stable")])

        return propose

    def _vocabulary_features(self, features: Features, position: int) -> Floats:
        return features(self._vocabulary(position))

    def _vocabulary(self, position: int) -> Floats:
        if self._model.positions is None and not self._model.is_centred:
            return self._model.embedding
        return self._centred(self._model.vocabulary(position))

    def _features_alone(self, features: Features, layer: int) -> tuple[Floats, Floats]:
        """Features of every token without what came before, and their squared lengths."""
        table = features(self._rows_alone(layer))
        return table, np.square(table).sum(axis=1)

    def _all_rows_alone(self, layer: int) -> Floats:
        ids = range(self._model.config.vocab_size)
        return self._centred(self._new_states(layer).rows((), ids))

    def _new_states(self, layer: int) -> CandidateStates:
        slots = SHALLOW_SLOTS if layer <= SHALLOW else DEEP_SLOTS
        return CandidateStates(self._model, layer, slots, self._num_positions)

    def _new_rows_of(self, layer: int) -> RowsOf:
        if layer == 0:
            return lambda prefix, ids: self._vocabulary(len(prefix))[list(ids)]
        states = self._new_states(layer)
        return lru_cache(maxsize=KEPT_PARTS)(
            lambda prefix, ids: self._centred(states.rows(prefix, ids))
        )

    def _centred(self, rows: Floats) -> Floats:
        return without_mean(rows) if self._model.is_centred else rows


def recover_all(
    attacker: Attacker,
    mode: Mode,
    seen: Observations,
    layers: Sequence[int],
    scope: Scope,
    progress: Progress | None,
) -> list[Recovery]:
    """Try everything; tokens known in advance do not count."""
    planned = [
        (each, layer) for layer in layers for each in ATTACKS if each.fits(mode, layer)
    ]
    total, done = sum(len(scope.texts_at(layer)) for _, layer in planned), 0
    found = []
    for each, layer in planned:
        right = count = 0
        candidates = ""
        for index in scope.texts_at(layer):
            text = seen.texts[index]
            tokens, candidates = attacker.recover(each, seen, index, layer)
            pairs = list(zip(text, tokens, strict=True))[each.num_known :]
            right += sum(mine == other for mine, other in pairs)
            count += len(pairs)
            done += 1
            if progress is not None:
                progress(done, total)
        found.append(
            Recovery(
                attack=each.name,
                attacker=each.attacker,
                layer=layer,
                candidates=candidates,
                tokens=count,
                token_recovery=right / count,
            )
        )
    return found
