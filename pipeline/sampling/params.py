"""How a request's tokens are chosen: values only, checked where they are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pipeline.errors import InputError

_NO_BIAS: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Greedy unless told otherwise. Raises InputError naming the value that makes no sense.

    `top_k` 0 and the other neutral values switch a filter off. `logprobs` None asks for none,
    `n` for the chosen token's and the `n` most likely ones', all under the model's own
    distribution, before any of the other fields has changed it.
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

    def __post_init__(self) -> None:
        """Check every field. Raises InputError."""
        self._check("temperature", self.temperature, self.temperature >= 0, "at least 0")
        self._check("top_k", self.top_k, self.top_k >= 0, "at least 0")
        self._check("top_p", self.top_p, 0 <= self.top_p <= 1, "between 0 and 1")
        self._check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        penalty = self.repetition_penalty
        self._check("repetition_penalty", penalty, penalty > 0, "above 0")
        self._check("presence_penalty", self.presence_penalty, True, "finite")
        self._check("frequency_penalty", self.frequency_penalty, True, "finite")
        self._check("logprobs", self.logprobs or 0, (self.logprobs or 0) >= 0, "at least 0")
        for token_id, bias in self.logit_bias.items():
            self._check("logit_bias", bias, token_id >= 0, "for a token id of at least 0")
        if "" in self.stop:
            raise InputError("a stop string is empty; give at least one character")

    @staticmethod
    def _check(name: str, value: float, is_valid: bool, expected: str) -> None:
        if not (is_valid and math.isfinite(value)):
            raise InputError(f"{name} is {value}; it must be finite and {expected}")

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits of the next."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def needs_logits(self) -> bool:
        """False when the most likely token, chosen where the logits are, is all it takes."""
        return (
            self.temperature > 0
            or self.logprobs is not None
            or self.has_penalties
            or bool(self.logit_bias)
        )
