"""One request's choices, one token after another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError, MessageError
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.processors import (
    Logits,
    LogitsProcessor,
    add_bias,
    count_penalties,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_softmax,
    most_likely,
    repetition_penalty,
    scale_temperature,
)

# numpy takes seeds of any size but no negative ones; clients send signed 64-bit numbers.
_SEED_MASK = (1 << 64) - 1
_BLOCK = 256


class Choice(NamedTuple):
    """A chosen token; `top` holds (token id, logprob), the likeliest first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses a request's tokens and remembers them.

    Owns its random numbers, one per sampled token, so that the same seed gives the same tokens
    whoever shares the batch. Order: repetition penalty, presence and frequency penalty, bias, the
    user's processors, temperature, top-k, top-p, min-p.
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
        self._num_prompt = len(prompt_ids)
        self._history: _History | None = None
        seed = params.seed
        self._random = np.random.default_rng(None if seed is None else seed & _SEED_MASK)

    def choose(self, logits: npt.NDArray[np.float32]) -> Choice:
        """The next token, from the logits `[vocab]` the model gave it.

        Raises MessageError if the logits are not numbers, InputError if the request's own
        processors leave no token to choose.
        """
        if logits.ndim != 1 or logits.size == 0 or not np.isfinite(logits.max()):
            raise MessageError(f"the last stage returned logits {logits.shape} that are no numbers")
        changed = self._process(logits)
        if not np.isfinite(changed.max()):
            raise InputError("the logits processors leave no token that can be chosen")
        token_id = self._pick(changed)
        self._token_ids.append(token_id)
        if self._history is not None:
            self._history.add(token_id)
        if self._params.logprobs is None:
            return Choice(token_id, None, ())
        logprobs = log_softmax(logits)
        top = most_likely(logits, self._params.logprobs)
        return Choice(
            token_id,
            float(logprobs[token_id]),
            tuple((int(i), float(logprobs[i])) for i in top),
        )

    def _process(self, logits: Logits) -> Logits:
        params = self._params
        if params.has_penalties:
            history = self._history
            if history is None:
                generated = self._token_ids[self._num_prompt :]
                prompt = self._token_ids[: self._num_prompt]
                history = self._history = _History(logits.size, prompt, generated)
            if params.repetition_penalty != 1.0:
                logits = repetition_penalty(logits, history.is_seen, params.repetition_penalty)
            logits = count_penalties(
                logits, history.counts, params.presence_penalty, params.frequency_penalty
            )
        if params.logit_bias:
            logits = add_bias(logits, params.logit_bias)
        for processor in self._processors:
            logits = processor(self._token_ids, logits)
        return logits

    def _pick(self, logits: Logits) -> int:
        params = self._params
        if params.temperature == 0:
            return int(logits.argmax())
        logits = scale_temperature(logits, params.temperature)
        if params.top_k:
            logits = keep_top_k(logits, params.top_k)
        if params.top_p < 1:
            logits = keep_top_p(logits, params.top_p)
        if params.min_p > 0:
            logits = keep_min_p(logits, params.min_p)
        return draw(logits, self._random.random())


class _History:
    """Which tokens a text has, `[vocab]` each: all of them, and how often each was generated."""

    def __init__(self, vocab: int, prompt: Sequence[int], generated: Sequence[int]) -> None:
        self.is_seen = np.zeros(vocab, np.bool_)
        self.counts = np.zeros(vocab, np.int32)
        self.is_seen[list(prompt)] = True
        for token_id in generated:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        self.is_seen[token_id] = True
        self.counts[token_id] += 1


def draw(logits: Logits, uniform: float) -> int:
    """The token at which the cumulative probability passes `uniform`, in [0, 1)."""
    # Sums of blocks first, then inside one: adding up the whole vocabulary in turn takes six times
    # as long. The first sum strictly above has a weight of its own, so no masked token is drawn.
    blocks = np.zeros((-(-logits.size // _BLOCK), _BLOCK), np.float32)
    np.exp(logits - logits.max(), out=blocks.reshape(-1)[: logits.size])
    sums = blocks.sum(axis=1, dtype=np.float64)
    ends = np.cumsum(sums)
    target = uniform * ends[-1]
    block = _first_above(ends, target, sums)
    rest = max(target - (ends[block] - sums[block]), 0.0)
    inside = np.cumsum(blocks[block], dtype=np.float64)
    return block * _BLOCK + _first_above(inside, rest, blocks[block])


def _first_above(
    cumulative: npt.NDArray[np.float64], target: float, weights: npt.NDArray[np.floating[Any]]
) -> int:
    """The first index whose sum is above `target`; the last with a weight if rounding passed it."""
    index = int(np.searchsorted(cumulative, target, side="right"))
    return index if index < cumulative.size else int(np.flatnonzero(weights)[-1])
