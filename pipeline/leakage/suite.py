"""Every attack that fits a mode, on every text, at every layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.leakage.attacker import Attacker
from pipeline.leakage.attacks.gram_matching import gram_matching
from pipeline.leakage.attacks.known_prefix import known_prefix
from pipeline.leakage.attacks.known_weights import known_weights
from pipeline.leakage.attacks.many_sessions import averaged_noise, shared_secret
from pipeline.leakage.attacks.nearest_vocabulary import nearest_vocabulary
from pipeline.leakage.attacks.row_space import row_space
from pipeline.leakage.attacks.sorted_matching import sorted_matching
from pipeline.leakage.cards import Recovery
from pipeline.leakage.evidence import Attack
from pipeline.leakage.modes import Mode
from pipeline.leakage.observations import Observations
from pipeline.progress import Progress

# Beyond layer 0, where a wrong first token spoils all rows behind it: templates begin alike.
KNOWN_AT_DEPTH = 1

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
    is_unordered: bool = False  # which tokens there are counts, wherever they stand
    is_brief: bool = False  # behind layer 0 on few texts, since another is both stronger and faster


def _vocabulary_fits(mode: Mode, layer: int) -> bool:
    return layer == 0 if mode.disguise else layer <= 1


def _guided_fits(mode: Mode, layer: int) -> bool:
    if mode.disguise == "masks":
        return layer > 0
    return mode.disguise is None and layer != 1


def _sorted_fits(mode: Mode, layer: int) -> bool:
    return mode.disguise == "permutation" or (mode.disguise is not None and layer == 0)


def _in_another_basis(mode: Mode) -> bool:
    """Whether a matrix in the weights hides rows, one for all layers and sessions."""
    return mode.disguise in {"permutation", "rotation"}


def _disguised(mode: Mode, layer: int) -> bool:
    return _in_another_basis(mode) or (mode.disguise is not None and layer == 0)


def _disguised_shallow(mode: Mode, layer: int) -> bool:
    return _disguised(mode, layer) and layer <= 1


def _sent_noise(mode: Mode, layer: int) -> bool:
    return mode.has_noise and layer == 0


def _mixed(mode: Mode, layer: int) -> bool:
    return mode.disguise == "mixing" and layer == 1


def _mixed_guided(mode: Mode, layer: int) -> bool:
    return mode.disguise == "mixing" and layer != 1


def _mixed_at_first(mode: Mode, layer: int) -> bool:
    return mode.disguise == "mixing" and layer == 0


PUBLIC = "public W"
SESSIONS = "many-sessions", f"{PUBLIC} + many sessions"
ATTACKS = (
    NamedAttack("nearest-vocabulary", PUBLIC, nearest_vocabulary, _vocabulary_fits),
    NamedAttack("language-model-guided", PUBLIC, nearest_vocabulary, _guided_fits, is_guided=True),
    NamedAttack("sorted-matching", PUBLIC, sorted_matching, _sorted_fits),
    NamedAttack("gram-matching", PUBLIC, gram_matching, _disguised_shallow, is_brief=True),
    *(
        NamedAttack(
            f"known-prefix-{count}",
            f"{PUBLIC} + {count} known tokens",
            known_prefix,
            _disguised_shallow,
            num_known=count,
            is_brief=True,
        )
        for count in (8, 32)
    ),
    NamedAttack("row-space", PUBLIC, row_space, _mixed),
    NamedAttack("row-space", PUBLIC, row_space, _mixed_guided, is_guided=True),
    NamedAttack("row-space-unordered", PUBLIC, row_space, _mixed_at_first, is_unordered=True),
    NamedAttack("known-weights", f"{PUBLIC} + W'", known_weights, _disguised),
    NamedAttack(*SESSIONS, shared_secret, _disguised, is_brief=True),
    NamedAttack(*SESSIONS, averaged_noise, _sent_noise),
)


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is attacked: deep layers on few texts only."""

    num_texts: int = 20
    num_tokens: int = 64
    num_deep_texts: int = 2
    num_deep_tokens: int = 64
    layers: tuple[int, ...] | None = None  # None: 0, 1, the middle and the last

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose input is looked at."""
        return self.layers or tuple(sorted({0, 1, num_layers // 2, num_layers - 1}))

    def texts_of(self, each: NamedAttack, layer: int) -> range:
        """Which texts are attacked at a layer."""
        is_whole = layer == 0 or (layer == 1 and not each.is_brief)
        return range(self.num_texts if is_whole else min(self.num_texts, self.num_deep_texts))

    def tokens_at(self, layer: int) -> int:
        """How many tokens of a text are attacked at a layer."""
        return self.num_tokens if layer <= 1 else min(self.num_tokens, self.num_deep_tokens)


def recover_all(
    attacker: Attacker,
    mode: Mode,
    seen: Observations,
    layers: Sequence[int],
    scope: Scope,
    progress: Progress | None,
) -> list[Recovery]:
    """Try everything."""
    planned = [
        (each, layer)
        for layer in layers
        for each in ATTACKS
        if each.fits(mode, layer) and each.num_known < scope.tokens_at(layer)
    ]
    total, done = sum(len(scope.texts_of(*task)) for task in planned), 0
    found = []
    for each, layer in planned:
        part = part_of_tasks(progress, done, total)
        found.append(recover(attacker, each, seen, layer, scope, part))
        done += len(scope.texts_of(each, layer))
    return found


def recover(
    attacker: Attacker,
    each: NamedAttack,
    seen: Observations,
    layer: int,
    scope: Scope,
    progress: Progress | None,
) -> Recovery:
    """Try one attack at one layer; tokens known in advance do not count."""
    right = count = 0
    texts, known = scope.texts_of(each, layer), max(each.num_known, KNOWN_AT_DEPTH * (layer > 0))
    for done, index in enumerate(texts, 1):
        text = seen.texts[index][: scope.tokens_at(layer)]
        comparison = each.attack(seen.evidence(index, layer, known))
        if each.is_unordered:
            present = attacker.present(comparison, len(text))
            right += sum(token in present for token in text)
            count += len(text)
            continue
        tokens = attacker.recover(
            comparison, layer, len(text), text[:known], is_guided=each.is_guided
        )
        right += sum(
            mine == other for mine, other in zip(text[known:], tokens[known:], strict=True)
        )
        count += len(text) - known
        if progress is not None:
            progress(done, len(texts))
    return Recovery(
        attack=each.name,
        attacker=each.attacker if known == each.num_known else f"{each.attacker} + first token",
        layer=layer,
        candidates=attacker.considered(layer, is_guided=each.is_guided),
        tokens=count,
        token_recovery=right / count,
    )


def part_of_tasks(progress: Progress | None, before: int, total: int) -> Progress | None:
    """The progress of a part of `total` pieces of work, behind the first ones."""
    if progress is None:
        return None
    whole = progress
    return lambda done, _: whole(before + done, total)
