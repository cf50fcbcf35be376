"""What picks a token from the final distribution, and what the registered ones are called.

A chooser comes after all filters, keeps state for its own request alone, and is asked once for each
token. Others than these plug in as `Generation.chooser`, or here by a name.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.sampling.draw import final, token_at
from pipeline.sampling.filters import Logits
from pipeline.sampling.params import ChooserSpec, Option, SamplingParams
from transport.frozen import frozen

# numpy takes seeds of any size but no negative ones; clients send signed 64-bit numbers.
_SEED_MASK = (1 << 64) - 1


class Distribution:
    """What a token is to be chosen from: penalties, masks, temperature and filters applied.

    Temperature and filters are, by `params`, once somebody asks for what they leave.

    Shapes: logits float32 [vocab], -inf for a token that may not be chosen; ids [n] in rising
    order, probabilities float64 [n], all above 0, of sum 1.
    """

    def __init__(self, unfiltered: Logits, params: SamplingParams) -> None:
        self._unfiltered = unfiltered
        self._params = params

    @cached_property
    def most_likely(self) -> int:
        """The token that no filter leaves out: of several the one with the lowest id."""
        return int(self._unfiltered.argmax())

    @cached_property
    def logits(self) -> Logits:
        """All tokens'."""
        return final(self._unfiltered, self._params)

    def holds(self, token_id: int) -> bool:
        """Whether a token may be chosen."""
        if token_id == self.most_likely:
            return True
        return 0 <= token_id < self.logits.size and bool(self.logits[token_id] > -np.inf)

    @property
    def ids(self) -> npt.NDArray[np.intp]:
        """The tokens that may be chosen."""
        return self._support[0]

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """The probability of each."""
        return self._support[1]

    @cached_property
    def _support(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        ids = np.flatnonzero(self.logits > -np.inf)
        weights = np.exp((self.logits[ids] - self.logits.max()).astype(np.float64))
        chances = weights / weights.sum()
        is_possible = chances > 0
        return ids[is_possible], chances[is_possible]


class Chooser(Protocol):
    """Chooses all tokens of one request, or has the last stage draw them by numbers of its own."""

    def choose(self, final: Distribution) -> int:
        """The next token, one of `final.ids`."""
        ...

    def uniform(self, ahead: int = 0) -> float:
        """The number by which the last stage is to draw the next token: the same until spent.

        Or one of those behind it, `ahead` of them further.
        """
        del ahead
        return 0.0

    def spend(self) -> None:
        """The last stage has drawn the next token."""
        return


ChooserFactory = Callable[[], Chooser]


class InverseCdf(Chooser):
    """Draws each token with its probability, by one random number."""

    def __init__(self, random: "np.random.Generator") -> None:
        self._random = random
        # Those that have been told and not been spent, the next first.
        self._uniforms: deque[float] = deque()

    def uniform(self, ahead: int = 0) -> float:
        """As `Chooser.uniform`."""
        while len(self._uniforms) <= ahead:
            self._uniforms.append(self._random.random())
        return self._uniforms[ahead]

    def spend(self) -> None:
        """As `Chooser.spend`."""
        self._uniforms.popleft()

    def choose(self, final: Distribution) -> int:
        """As `Chooser.choose`."""
        token_id = token_at(final.logits, self.uniform())
        self.spend()
        return token_id


class Greedy(Chooser):
    """Takes the most likely token; of several the one with the lowest id."""

    def choose(self, final: Distribution) -> int:
        """As `Chooser.choose`."""
        return final.most_likely


class Mirostat(Chooser):
    """Keeps the text's surprise near `tau` bits a token, whatever the model's confidence.

    Tokens above a surprise are left out, and `eta` is how fast that bound follows the surprise of
    the tokens drawn. Source: Basu et al. 2021, algorithm 2 (Mirostat 2.0).
    """

    def __init__(self, random: "np.random.Generator", tau: float = 5.0, eta: float = 0.1) -> None:
        self.bound = 2 * tau
        self._random = random
        self._tau = tau
        self._eta = eta

    def choose(self, final: Distribution) -> int:
        """As `Chooser.choose`."""
        surprises = -np.log2(final.probabilities)
        is_kept = surprises <= max(self.bound, surprises.min())
        places = np.flatnonzero(is_kept)
        ends = np.cumsum(final.probabilities[places])
        index = np.searchsorted(ends, self._random.random() * ends[-1], side="right")
        place = places[min(int(index), places.size - 1)]  # rounding may pass the last
        self.bound -= self._eta * (surprises[place] - self._tau)
        return int(final.ids[place])


@frozen
class ChooserKind:
    """How to make one for a request, and what reads each of its options, raising ValueError."""

    make: Callable[..., Chooser]
    options: Mapping[str, Callable[[Option], Any]] = field(default_factory=dict)


def number(low: float, high: float) -> Callable[[Option], float]:
    """Reads numbers above `low` and up to `high`."""

    def read(value: Option) -> float:
        try:
            parsed = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):  # a client sends any JSON
            parsed = math.nan
        if not low < parsed <= high:
            raise ValueError(f"give a number above {low:g}, at most {high:g}")
        return parsed

    return read


CHOOSERS: Mapping[str, ChooserKind] = {
    "draw": ChooserKind(InverseCdf),
    "greedy": ChooserKind(lambda _: Greedy()),
    "mirostat": ChooserKind(Mirostat, {"tau": number(0, 20), "eta": number(0, 1)}),
}


def parse_chooser(text: str) -> ChooserSpec:
    """Read `NAME` or `NAME:key=value,...`. Raises InputError."""
    name, _, rest = text.partition(":")
    options: dict[str, Option] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals or key in {"name", *options}:
            raise InputError(f"chooser {name}: {part!r} is not one more option, as key=value")
        options[key] = value
    return chooser_of({"name": name, **options})


def chooser_of(fields: Mapping[str, Any]) -> ChooserSpec:
    """Read `{"name": NAME, key: value, ...}`. Raises InputError."""
    options = dict(fields)
    spec = ChooserSpec(str(options.pop("name", "")), options)
    _read_options(spec)
    return spec


def in_parameters(params: SamplingParams) -> SamplingParams:
    """The same without a chooser's name, where the other parameters say all that it does."""
    match params.chooser:
        case ChooserSpec("draw"):
            return replace(params, chooser=None)
        case ChooserSpec("greedy"):
            return replace(params, chooser=None, temperature=0.0)
    return params


def new_chooser(params: SamplingParams) -> Chooser:
    """The chooser of a request that has these parameters. Raises InputError."""
    random = np.random.default_rng(None if params.seed is None else params.seed & _SEED_MASK)
    if params.chooser is not None:
        options = _read_options(params.chooser)
        return CHOOSERS[params.chooser.name].make(random, **options)
    return InverseCdf(random) if params.temperature else Greedy()


def _shown(value: object) -> str:
    """As much of what somebody sent as fits a line."""
    return repr(value)[:60]


def _read_options(spec: ChooserSpec) -> dict[str, Any]:
    kind = CHOOSERS.get(spec.name)
    if kind is None:
        raise InputError(f"there is no chooser {_shown(spec.name)}, but {', '.join(CHOOSERS)}")
    options = {}
    for key, value in spec.options.items():
        if key not in kind.options:
            known = ", ".join(kind.options) or "none"
            raise InputError(f"chooser {spec.name} has no option {_shown(key)}; it has {known}")
        try:
            options[key] = kind.options[key](value)
        except ValueError as error:
            raise InputError(f"chooser {spec.name}: {key} is {_shown(value)}; {error}") from None
    return options
