"""One request's choices, one token after another."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError, MessageError
from pipeline.sampling.choosers import Chooser, Distribution, Greedy, new_chooser
from pipeline.sampling.draw import final
from pipeline.sampling.filters import (
    Logits,
    LogitsProcessor,
    add_bias,
    count_penalties,
    log_softmax,
    most_likely,
    repetition_penalty,
)
from pipeline.sampling.masks import Allowed, Mask
from pipeline.sampling.params import SamplingParams


class Choice(NamedTuple):
    """A chosen token; `top` holds (token id, logprob), the likeliest first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses a request's tokens and remembers them.

    Owns its random numbers, so that the same seed gives the same tokens whoever shares the batch.
    Order: repetition penalty, presence and frequency penalty, bias, the user's processors, masks;
    then temperature, top-k, top-p, min-p; then the chooser.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        processors: Sequence[LogitsProcessor] = (),
        masks: Sequence[Mask] = (),
        chooser: Chooser | None = None,
    ) -> None:
        """`chooser`: in the place of the one that `params` name."""
        self._params = params
        self._processors = tuple(processors)
        self._masks = tuple(masks)
        self._token_ids = list(prompt_ids)
        self._num_prompt = len(prompt_ids)
        self._history: _History | None = None
        self._chooser = chooser or new_chooser(params)

    def choose(self, logits: npt.NDArray[np.float32]) -> Choice:
        """The next token, from the logits `[vocab]` the model gave it.

        Raises MessageError if the logits are not numbers, InputError if the request's own
        processors and masks leave no token to choose, or its chooser takes one that is not left.
        """
        if logits.ndim != 1 or logits.size == 0 or not np.isfinite(logits.max()):
            raise MessageError(f"the last stage returned logits {logits.shape} that are no numbers")
        changed = self._change(logits)
        if not np.isfinite(changed.max()):
            raise InputError("processors and masks leave no token that can be chosen")
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

    def _change(self, logits: Logits) -> Logits:
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
        allowed = self._allowed(logits.size)
        return logits if allowed is None else np.where(allowed, logits, np.float32(-np.inf))

    def _allowed(self, vocab_size: int) -> Allowed | None:
        """What all masks allow to come next, [vocab]; None: anything."""
        allowed: Allowed | None = None
        for mask in self._masks:
            more = mask.allowed(self._token_ids[self._num_prompt :], vocab_size)
            if more is not None:
                allowed = more if allowed is None else allowed & more
        return allowed

    def _pick(self, logits: Logits) -> int:
        if isinstance(self._chooser, Greedy):  # filters never leave out the most likely token
            return self._chooser.choose(Distribution(logits))
        left = final(logits, self._params)
        token_id = self._chooser.choose(Distribution(left))
        if not (0 <= token_id < left.size and left[token_id] > -np.inf):
            raise InputError(f"the chooser took token {token_id}, which is not left to choose from")
        return token_id


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
