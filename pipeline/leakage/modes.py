"""The modes, as data: what a server sees in each, what it can do, and what is promised of it.

A new mode adds an entry here, a view, and the card that measuring it gives. Whatever changes what a
server sees raises the mode's version: its card is then another's, and has to be measured anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from pipeline.codecs.base import ActivationCodec
from pipeline.codecs.privacy_budget import MAX_EPSILON, PrivacyBudget
from pipeline.codecs.registry import make_codec
from pipeline.dtypes import Floats
from pipeline.errors import InputError
from pipeline.leakage import views
from pipeline.leakage.views import Random, View
from transport.frozen import frozen

# The noise under which SmolLM2's text is still its own, and a length that no embedding exceeds.
USABLE_SIGMA, LONGEST_EMBEDDING = 0.03, 7.5
TOKEN_BYTES = 4  # an id on its way in, and one on its way out

Disguise = Literal["permutation", "rotation", "masks", "mixing"] | None
# What a server has: rows between layers; keys and values under keys, which it may have as well; or
# what linears take, as they are asked for.
Holds = Literal["rows", "encoded rows", "encoded rows and their keys", "masked words", "mixed rows"]
MakeView = Callable[[int, Random], View]  # of a hidden size, with its randomness

SILENT = (
    "answers with other rows than the layers give, all or one in a thousand: the text is another, "
    "and nothing in it shows that"
)
FOUND_BY = (
    "attestation of the code and its weights; without it only computing samples of the rows again"
)


@frozen
class Mode:
    """One way of using stages that nobody attests."""

    name: str
    version: int
    make_view: MakeView
    protects: str  # what it does and does not, in one plain sentence
    lying_server: str = SILENT
    found_by: str = FOUND_BY
    setting: str = ""
    is_client_split: bool = True  # embedding, final norm and head with the user
    disguise: Disguise = None  # one secret for all sessions, in the server's weights
    sigma: float = 0.0  # of the noise, anew in every session
    sigmas: tuple[float, ...] = ()  # strengths of the noise that are measured beside
    wire: str = "F32"  # the codec that rows travel by
    round_trips_per_token: int = 1
    holds: Holds = "rows"
    is_offered: bool = True  # otherwise an attack's target and nothing to run

    @property
    def has_noise(self) -> bool:
        """Whether rows are sent with noise."""
        return self.sigma > 0

    def with_sigma(self, sigma: float) -> "Mode":
        """The same with noise of another strength."""
        return replace(self, sigma=sigma, make_view=views.noisy(sigma, LONGEST_EMBEDDING))

    def epsilon(self, num_rows: int, delta: float) -> float | None:
        """What the noise on so many rows adds up to; None where there is none."""
        if not self.has_noise:
            return None
        # no bound is kept to here
        budget = PrivacyBudget(self.sigma, LONGEST_EMBEDDING, MAX_EPSILON, delta)
        return budget.composed_epsilon(num_rows)

    def on_the_wire(self, rows: Floats) -> Floats:
        """Rows as they come out of the codec that they travel by. Raises MessageError."""
        codec = self.codec(rows.shape[-1])
        if codec.is_plain_f32:
            return rows
        # what is decoded may lie in the frame
        return np.array(codec.decode(codec.encode(rows.reshape(-1, rows.shape[-1])))).reshape(
            rows.shape
        )

    def codec(self, hidden_dim: int) -> ActivationCodec:
        """How rows of that width travel. Raises InputError for a width that has no such codec."""
        try:
            return make_codec(self.wire, hidden_dim)
        except ValueError as error:
            raise InputError(f"--mode {self.name}: {error}") from error

    def bytes_per_token(self, hidden_dim: int, num_stages: int) -> int:
        """What a token moves over all links of so many stages."""
        row = sum(spec.nbytes for spec in self.codec(hidden_dim).specs(1))
        if self.is_client_split:
            return (num_stages + 1) * row
        return (num_stages - 1) * row + 2 * TOKEN_BYTES


_ALL = (
    Mode(
        "plain",
        1,
        views.plain,
        "Protects nothing from the stages: their hosts read every token, unless they are attested "
        "enclaves.",
        is_client_split=False,
    ),
    Mode(
        "client",
        1,
        views.plain,
        "Stages are never sent a token or a logit, but the activations they compute on give the "
        "tokens back to whoever has the public weights.",
    ),
    Mode(
        "permute",
        1,
        views.permuted,
        "A secret order of the hidden dimensions hides nothing from whoever has the public "
        "weights.",
        disguise="permutation",
        is_offered=False,
    ),
    Mode(
        "rotate",
        1,
        views.plain,
        "A secret rotation changes what activations look like and not what they tell: no "
        "confidentiality against someone who has the public weights.",
        disguise="rotation",
    ),
    Mode(
        "rotate-int8",
        2,
        views.plain,
        "Makes the wire 28 % as wide at hardly any loss; no confidentiality against someone who "
        "has the public weights.",
        disguise="rotation",
        wire="I8",
    ),
    Mode(
        "dp",
        1,
        views.noisy(USABLE_SIGMA, LONGEST_EMBEDDING),
        "Noise that leaves the text usable leaves the tokens readable; noise that hides them "
        "leaves no text.",
        setting=f"sigma {USABLE_SIGMA}, clipped to {LONGEST_EMBEDDING}",
        sigma=USABLE_SIGMA,
        sigmas=(0.1, 0.5, 2.42),
    ),
    Mode(
        "scx",
        1,
        views.plain,
        "Keys and values lie encoded with a worker that has no key: lengths and products of rows "
        "stay, so whoever has the public weights reads the text from them.",
        lying_server="answers with something else than attention, or with an old answer: the text "
        "is another, and nothing in it shows that",
        found_by="answers that no attention gives (longer than every row, no numbers) and rows "
        "that come back altered; else only computing samples of the rows again",
        setting="permutation and dense keys",
        is_client_split=False,
        holds="encoded rows",
    ),
    Mode(
        "scx-paper",
        1,
        views.plain,
        "Outer layers stay at home, but stages between get rows and the keys that theirs are "
        "encoded by: whoever runs them reads the text with the public weights.",
        setting="one layer at home at each end",
        is_client_split=False,
        holds="encoded rows and their keys",
    ),
    Mode(
        "offload",
        1,
        views.masked,
        "The worker that computes the linears sees random words, and learns how many tokens come "
        "when: nothing of a text.",
        lying_server="is found out before anything that it made up is used",
        found_by="40 secret vectors (Freivalds): one wrong answer in 2^40 passes",
        is_client_split=False,
        disguise="masks",
        holds="masked words",
    ),
    Mode(
        "mix",
        1,
        views.mixed,
        "Mixing a prompt's rows hides their order and nothing of what they are: whoever has the "
        "public weights reads prompts shorter than the model is wide.",
        lying_server="is found out before anything that it made up is used",
        found_by="40 secret vectors (Freivalds): one wrong answer in 2^40 passes",
        is_client_split=False,
        disguise="mixing",
        round_trips_per_token=0,
        holds="mixed rows",
    ),
)
MODES: Mapping[str, Mode] = MappingProxyType({mode.name: mode for mode in _ALL})


def find_mode(name: str) -> Mode:
    """Raises InputError where there is none of that name."""
    mode = MODES.get(name)
    if mode is None:
        raise InputError(f"no mode is called {name[:80]!r}; use {', '.join(MODES)}")
    return mode
