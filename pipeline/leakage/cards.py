"""Leakage cards: what was measured of a mode, carried by the package as JSON.

A card counts for one version of its mode; a mode without one is not used.
"""

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import PolicyError
from pipeline.leakage.modes import MODES, find_mode

DELTA = 1e-5  # what an epsilon of these cards holds but for

COLUMNS = (
    "mode",
    "tokens recovered, by layer",
    "max Δlogit",
    "KL",
    "same token",
    "tokens/s",
    "bytes, round trips a token",
    "a lying server is found by",
)

Rate = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]


class Part(BaseModel):
    """A part of a card."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class Recovery(Part):
    """What one attack gave back at one layer."""

    attack: str
    attacker: str  # what it needs beside the observations
    layer: Annotated[int, Field(ge=0)]
    candidates: str  # which tokens were considered
    tokens: Count  # that it was asked for
    token_recovery: Rate


class Utility(Part):
    """The mode's predictions beside those of the plain model, over every position of the texts."""

    max_logit_difference: NotNegative
    kl: NotNegative
    greedy_agreement: Rate


class Cost(Part):
    """Of one generated token, two stages and no network between them."""

    tokens_per_second: NotNegative
    plain_tokens_per_second: NotNegative
    bytes_per_token: Annotated[int, Field(ge=0)]
    round_trips_per_token: Annotated[int, Field(ge=0)]


class Integrity(Part):
    """What a lying server achieves, and what finds it."""

    lying_server: str
    found_by: str


class Uniformity(Part):
    """What a server is sent, held against words of which each is as likely: a chi-square test."""

    words: Count
    chi_square: NotNegative
    degrees: Count
    p_value: Rate


class Setting(Part):
    """One strength of a mode's noise: what the best attack recovers at layer 0, and the price."""

    sigma: NotNegative
    epsilon: NotNegative  # of one text, at DELTA
    attack: str
    token_recovery: Rate
    kl: NotNegative
    greedy_agreement: Rate


class Card(Part):
    """Everything that was measured of one mode."""

    mode: str
    version: Count
    setting: str
    model: str
    num_layers: Count
    texts: Count
    recoveries: Annotated[list[Recovery], Field(min_length=1)]
    utility: Utility
    cost: Cost
    integrity: Integrity
    epsilon: NotNegative | None  # of one text, at DELTA; of modes without noise there is none
    settings: list[Setting]
    uniformity: Uniformity | None = None  # of modes that send nothing but words under masks
    protects: str

    def at(self, layer: int) -> Recovery | None:
        """The attack that gives back most at a layer."""
        return max(
            (each for each in self.recoveries if each.layer == layer),
            key=lambda each: each.token_recovery,
            default=None,
        )


def parse_card(text: str, source: str) -> Card:
    """Raises PolicyError naming what is wrong with it."""
    try:
        return Card.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise PolicyError(f"{source}: {where or 'the card'}: {first['msg']}") from error


def load_card(mode: str, version: int) -> Card:
    """The card of a version of a mode. Raises PolicyError where there is none."""
    path = files("pipeline.leakage") / "cards" / f"{mode}.json"
    if not path.is_file():
        raise PolicyError(
            f"mode {mode} has no leakage card, so it is not used; measure one with "
            f"`pipeline-orch leakage --mode {mode}`"
        )
    card = parse_card(path.read_text(encoding="utf-8"), f"the leakage card of {mode}")
    if (card.mode, card.version) != (mode, version):
        raise PolicyError(
            f"the leakage card of {mode} was measured for version {card.version} of "
            f"{card.mode}, this is version {version}: measure it anew"
        )
    return card


def require_card(mode: str) -> Card:
    """What a mode's users are told of it, before anything is sent.

    Raises InputError for a mode that there is not, PolicyError for one that may not be used.
    """
    found = find_mode(mode)
    if not found.is_offered:
        raise PolicyError(f"mode {mode} is what attacks are tried on, and nothing to run")
    return load_card(found.name, found.version)


def markdown_table(cards: Sequence[Card] | None = None) -> str:
    """The cards as rows of a table: those that the package carries. Raises PolicyError."""
    if cards is None:
        cards = [load_card(mode.name, mode.version) for mode in MODES.values()]
    rule = "| --- " * len(COLUMNS) + "|"
    return "\n".join([f"| {' | '.join(COLUMNS)} |", rule, *map(_row, cards)]) + "\n"


def _row(card: Card) -> str:
    layers = sorted({each.layer for each in card.recoveries})
    best = [each for layer in layers if (each := card.at(layer)) is not None]
    recovered = ", ".join(f"{each.layer}: {each.token_recovery:.0%}" for each in best)
    utility, cost = card.utility, card.cost
    name = f"{card.mode} ({card.setting})" if card.setting else card.mode
    columns = (
        name,
        recovered,
        f"{utility.max_logit_difference:.1g}",
        f"{utility.kl:.1g}",
        f"{utility.greedy_agreement:.1%}",
        f"{cost.tokens_per_second:.1f} (plain {cost.plain_tokens_per_second:.1f})",
        f"{cost.bytes_per_token}, {cost.round_trips_per_token}",
        card.integrity.found_by,
    )
    return f"| {' | '.join(columns)} |"
