"""One request's choices, one token after another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError, RequestFailed
from pipeline.sampling.draw import NO_NUMBERS, Draw, History, adjust, choose, is_sound
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.processors import LogitsProcessor, log_softmax, most_likely

# numpy takes seeds of any size but no negative ones; clients send signed 64-bit numbers.
_SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; `top` holds (token id, logprob), the likeliest first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses a request's tokens, or says how the last stage has to, and remembers them.

    Owns its random numbers, one per sampled token, so that the same seed gives the same tokens
    whoever shares the batch, and wherever they are drawn. The order is that of `draw`; the user's
    processors come before temperature.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self._params = params
        self._processors = tuple(processors)
        self._token_ids = list(prompt_ids)
        self._history = History(prompt_ids) if params.has_penalties else None
        seed = params.seed
        self._random = np.random.default_rng(None if seed is None else seed & _SEED_MASK)
        # The next token's random number, for as long as it has none.
        self._uniform: float | None = None

    def next_draw(self) -> Draw:
        """How the next token has to be drawn: the same until one has been `took`."""
        if self._uniform is None:
            self._uniform = self._random.random() if self._params.temperature else 0.0
        if self._history is None:
            return Draw(self._params, (self._uniform,))
        history = self._history
        return Draw(self._params, (self._uniform,), history.seen, history.counts)

    def took(self, token_id: int) -> None:
        """The next token is this one, wherever it has been drawn."""
        self._uniform = None
        self._token_ids.append(token_id)
        if self._history is not None:
            self._history.add(token_id)

    def choose(self, logits: npt.NDArray[np.float32]) -> Choice:
        """The next token, from the logits `[vocab]` the model gave it.

        Raises RequestFailed if the logits are not numbers, InputError if the request's own
        processors leave no token to choose.
        """
        if not is_sound(logits):
            raise RequestFailed(NO_NUMBERS)
        how = self.next_draw()
        changed = adjust(logits, how)
        for processor in self._processors:
            changed = processor(self._token_ids, changed)
        if not is_sound(changed):
            raise InputError("the logits processors leave no token that can be chosen")
        token_id = choose(changed, self._params, how.uniforms[0])
        self.took(token_id)
        if self._params.logprobs is None:
            return Choice(token_id, None, ())
        logprobs = log_softmax(logits)
        top = most_likely(logits, self._params.logprobs)
        return Choice(
            token_id,
            float(logprobs[token_id]),
            tuple((int(i), float(logprobs[i])) for i in top),
        )
