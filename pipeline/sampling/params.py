"""How a request's tokens are chosen: values only, checked where they are made, for every door."""

from collections.abc import Mapping
from dataclasses import field
from types import MappingProxyType
from typing import NamedTuple

from pipeline.errors import InputError
from transport.frozen import frozen

Option = str | float

_NO_BIAS: Mapping[int, float] = MappingProxyType({})
_NO_OPTIONS: Mapping[str, Option] = MappingProxyType({})


class Range(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float


# What each number may be: OpenAI's ranges where it has the field.
RANGES = {
    "temperature": Range(0, 2),
    "top_k": Range(-1, (1 << 31) - 1),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0.01, 100),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "seed": Range(-(1 << 63), (1 << 64) - 1),
    "min_tokens": Range(0, (1 << 31) - 1),
    "logprobs": Range(0, 1 << 20),
}
BIAS = Range(-100, 100)
MAX_STOPS = 16  # OpenAI takes 4; each costs the same few steps per character
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024
MAX_ALLOWED = 1 << 14  # every continuation of a request looks at each once
# The largest vocabularies have a quarter of this.
MAX_TOKEN_ID = (1 << 20) - 1


@frozen
class ChooserSpec:
    """A registered chooser, by name, and its options as the user gave them."""

    name: str
    options: Mapping[str, Option] = field(default_factory=lambda: _NO_OPTIONS)


@frozen
class SamplingParams:
    """Greedy unless told otherwise. Raises InputError naming the value that makes no sense.

    `top_k` 0 or -1 and the other neutral values switch a filter off. `logprobs` None asks for none,
    `n` for the chosen token's and the `n` most likely ones', all under the model's own
    distribution, before any of the other fields has changed it. `allowed_token_ids` None allows
    all; no end token comes before `min_tokens` others. `chooser` None draws, or is greedy at
    temperature 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    chooser: ChooserSpec | None = None

    def __post_init__(self) -> None:
        """Check every field. Raises InputError."""
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None:
                _check(name, value, allowed)
        if len(self.logit_bias) > MAX_BIASES:
            raise InputError(f"logit_bias: give at most {MAX_BIASES} token ids")
        for token_id, bias in self.logit_bias.items():
            _check("a token id of logit_bias", token_id, Range(0, MAX_TOKEN_ID))
            _check("logit_bias", bias, BIAS)
        if self.allowed_token_ids is not None:
            if not 0 < len(self.allowed_token_ids) <= MAX_ALLOWED:
                raise InputError(f"allowed_token_ids: give 1 to {MAX_ALLOWED} token ids")
            for token_id in (min(self.allowed_token_ids), max(self.allowed_token_ids)):
                _check("allowed_token_ids", token_id, Range(0, MAX_TOKEN_ID))
        is_short = all(0 < len(stop) <= MAX_STOP_CHARS for stop in self.stop)
        if len(self.stop) > MAX_STOPS or not is_short:
            raise InputError(
                f"stop strings: give at most {MAX_STOPS}, of 1 to {MAX_STOP_CHARS} characters each"
            )
        if self.chooser is not None and self.chooser.name != "greedy" and self.temperature == 0:
            raise InputError(
                f"chooser {self.chooser.name} has one token to choose from at temperature 0; "
                "give a temperature above 0"
            )

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits of the next."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def has_mask(self) -> bool:
        """Whether some tokens are not allowed, at first if not throughout."""
        return self.allowed_token_ids is not None or self.min_tokens > 0

    @property
    def needs_logits(self) -> bool:
        """False when the most likely token, chosen where the logits are, is all it takes."""
        return (
            self.temperature > 0
            or self.logprobs is not None
            or self.has_penalties
            or bool(self.logit_bias)
            or self.has_mask
            or self.chooser is not None
        )


def _check(name: str, value: float, allowed: Range) -> None:
    if not allowed.low <= value <= allowed.high:  # which nothing is that is no number
        raise InputError(f"{name} is {value}; give a number from {allowed.low} to {allowed.high}")
