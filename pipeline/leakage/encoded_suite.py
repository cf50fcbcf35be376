"""Every attack on encoded keys and values, on every text, at every layer."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.dtypes import Floats
from pipeline.leakage import attention_attacks as attacks
from pipeline.leakage.attacker import Attacker
from pipeline.leakage.attention_rows import HeldText, LayerReaders
from pipeline.leakage.cards import Recovery
from pipeline.leakage.evidence import Features, RowByRow
from pipeline.leakage.modes import Mode
from pipeline.leakage.observations import Text
from pipeline.leakage.public_model import PublicModel
from pipeline.leakage.suite import KNOWN_AT_DEPTH, PUBLIC, Scope
from pipeline.progress import Progress

NUM_KNOWN = 32
NORMS, PROMPT, KEYS = "key-and-value-norms", f"known-prompt-{NUM_KNOWN}", "keys-in-hand"
ATTACKER = {
    PROMPT: f"{PUBLIC} + {NUM_KNOWN} known tokens",
    KEYS: f"{PUBLIC} + the keys",
}


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """The texts, the model that everybody has, and who attacks."""

    model_dir: Path
    model: PublicModel
    attacker: Attacker
    texts: Sequence[Text]
    scope: Scope

    def held(self, readers: LayerReaders, layer: int, count: int) -> list[tuple[Floats, HeldText]]:
        """Rows of each text at a layer, and what their holder has of them."""
        found = []
        for index, text in enumerate(self.texts[:count]):
            own = text[: self.scope.tokens_at(layer)]
            rows = self.model.rows_at_cuts(self.model.embed(own))[layer]
            seed = hashlib.sha256(b"text %d" % index).digest()  # each text has keys of its own
            found.append((rows, HeldText.encode(readers, rows, seed, layer)))
        return found


def recover_encoded(
    given: EncodedTexts, mode: Mode, layers: Sequence[int], progress: Progress | None
) -> list[Recovery]:
    """Try everything at layer 0, and deeper what does not need all tokens' rows at once."""
    has_keys = mode.holds == "encoded rows and their keys"
    found: list[Recovery] = []
    for done, layer in enumerate(layers):
        if progress is not None:
            progress(done, len(layers))
        readers = LayerReaders.load(given.model_dir, given.model.config, layer)
        scope = given.scope
        count = scope.num_texts if layer == 0 else min(scope.num_texts, scope.num_deep_texts)
        held = given.held(readers, layer, count)
        found += _at_first(given, readers, held) if layer == 0 else []
        found += _by_features(given, readers, held, layer, has_keys=has_keys)
    return found


def _at_first(
    given: EncodedTexts, readers: LayerReaders, held: list[tuple[Floats, HeldText]]
) -> list[Recovery]:
    """At layer 0, where every token's keys and values are known at every position."""
    vocabulary = attacks.Vocabulary.of(readers, given.model.embedding)
    texts = [each for _, each in held]

    def one_by_one(
        attack: Callable[[attacks.Vocabulary, HeldText], attacks.Ids],
    ) -> Callable[[], list[attacks.Ids]]:
        return lambda: [attack(vocabulary, each) for each in texts]

    tried: dict[str, Callable[[], list[attacks.Ids]]] = {
        "rows-with-rope-phase": lambda: attacks.by_rows(vocabulary, texts),
        "sorted-matching": lambda: attacks.by_sorted_rows(vocabulary, texts),
        "value-norms": one_by_one(attacks.by_value_lengths),
        "order-by-rope-phase": one_by_one(attacks.in_order_by_phase),
    }
    found = {name: _pairs(given, run()) for name, run in tried.items()}
    return [
        _recovery(name, 0, "all", [attacks.share(mine, text) for mine, text in pairs])
        for name, pairs in found.items()
    ]


def _by_features(
    given: EncodedTexts,
    readers: LayerReaders,
    held: list[tuple[Floats, HeldText]],
    layer: int,
    *,
    has_keys: bool,
) -> list[Recovery]:
    """What compares numbers of each row: lengths, what known tokens solve, what keys decode."""

    def tried() -> Iterator[tuple[str, int, list[tuple[Floats, Features]]]]:
        least = KNOWN_AT_DEPTH * (layer > 0)
        yield NORMS, least, [attacks.with_lengths(readers, each) for _, each in held]
        if given.scope.tokens_at(layer) > NUM_KNOWN:
            yield (
                PROMPT,
                NUM_KNOWN,
                [attacks.solved(readers, each, rows[:NUM_KNOWN]) for rows, each in held],
            )
        if has_keys:
            yield KEYS, least, [attacks.decoded(readers, rows) for rows, _ in held]

    found = []
    for name, num_known, compared in tried():
        shares = []
        for (observed, features), text in zip(compared, given.texts, strict=False):
            own = text[: len(observed)]
            tokens = _tokens(given, observed, features, layer, own[:num_known])
            shares.append(attacks.share(tokens, own, num_known))
        found.append(_recovery(name, layer, given.attacker.considered(layer), shares))
    return found


def _tokens(
    given: EncodedTexts, observed: Floats, features: Features, layer: int, known: Sequence[int]
) -> Sequence[int]:
    if layer == 0:
        table = features(given.model.embedding)
        return list(map(int, attacks.nearest_rows(observed, table)))
    comparison = RowByRow(observed, features)
    return given.attacker.recover(comparison, layer, len(observed), known)


def _pairs(
    given: EncodedTexts, found: list[attacks.Ids]
) -> Iterator[tuple[attacks.Ids, Sequence[int]]]:
    for mine, text in zip(found, given.texts, strict=False):
        yield mine, text[: len(mine)]


def _recovery(
    name: str, layer: int, candidates: str, shares: Sequence[tuple[int, int]]
) -> Recovery:
    right, count = np.sum(shares, 0).tolist()
    attacker = ATTACKER.get(name, PUBLIC)
    if layer and name != PROMPT:
        attacker = f"{attacker} + first token"
    return Recovery(
        attack=name,
        attacker=attacker,
        layer=layer,
        candidates=candidates,
        tokens=count,
        token_recovery=right / count,
    )
