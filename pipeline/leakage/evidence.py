"""What an attacker holds, and what an attack makes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pipeline.dtypes import Floats

# Rows of candidates [n, hidden] to what is compared of each [n, features].
Features = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows an attacker can compute, each beside what the server holds of it: [n, hidden] both."""

    public: Floats
    observed: Floats


@dataclass(frozen=True, slots=True)
class Evidence:
    """One text at one layer, as a mode's server has it. Rows are [tokens, hidden]."""

    observed: Floats
    # The rows of the text's first tokens, for an attacker who knows these.
    known: Floats
    # Rows of the public weights that read what is observed, and the server's own.
    readers: Pairs
    # Of other sessions whose text is known, under the same secret.
    other_sessions: Pairs
    # The same text sent in so many sessions: [sessions, tokens, hidden].
    repeated: Floats


class Comparison(Protocol):
    """How a text's observations are held against candidates, token after token."""

    def at(self, position: int, recovered: Mapping[int, Floats]) -> tuple[Floats, Features]:
        """What is compared of the observation at `position`: [features], and of candidates.

        `recovered`: the rows of tokens before it that the attacker is sure of, by position.
        """


@dataclass(frozen=True, slots=True)
class RowByRow:
    """A comparison that looks at each row alone."""

    observed: Floats  # [tokens, features]
    features: Features

    def at(self, position: int, recovered: Mapping[int, Floats]) -> tuple[Floats, Features]:
        """The row's features, whatever came before it."""
        del recovered
        return self.observed[position], self.features


Attack = Callable[[Evidence], Comparison]


def as_they_are(rows: Floats) -> Floats:
    """All of each row."""
    return rows
