"""How a token is drawn from logits: the same function wherever the logits are.

Drawn at home from returned logits or on the last stage, a token is the same: it depends on the
logits, on what `Draw` says and on nothing else. Order: repetition penalty, presence and frequency
penalty, bias, the mask of allowed tokens; then temperature, top-k, top-p, min-p; then the token at
which the cumulative probability passes a uniform number, which the request's owner has drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.errors import RequestFailed
from pipeline.sampling.filters import (
    Logits,
    add_bias,
    count_penalties,
    keep_min_p,
    keep_most_likely,
    keep_top_k,
    keep_top_p,
    repetition_penalty,
    scale_temperature,
)
from pipeline.sampling.params import SamplingParams

TokenIds = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.intp]
Weights = npt.NDArray[np.float64]

_BLOCK = 256
_CHUNK = 32 * _BLOCK  # what fits a first-level cache, and needs no memory of the system's
NO_NUMBERS = (
    "no token can be chosen: the last stage's answer holds no numbers; something overflowed"
)
NONE_LEFT = "no token can be chosen: bias and mask leave none"


def _none() -> TokenIds:
    return np.empty(0, np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """All that decides the tokens of some rows in turn, beside their logits.

    Shapes: uniforms [rows], each in [0, 1); text [n]: where there are penalties all tokens so far,
    the first num_prompt of them the prompt's; drafted [rows - 1]: the tokens that the rows behind
    the first have read since; allowed: a bit for each token and row, lowest first, each row's in
    bytes of its own, or none where all are allowed.
    """

    params: SamplingParams
    uniforms: tuple[float, ...] = (0.0,)
    # Not each token once: how much travels would then say when one comes again.
    text: TokenIds = field(default_factory=_none)
    num_prompt: int = 0
    drafted: tuple[int, ...] = ()
    allowed: bytes = b""


def draw(logits: Logits, how: Draw, row: int = 0) -> int:
    """The token of a row with these logits, [vocab].

    Raises RequestFailed where they are no numbers, or nothing is left that may be chosen.
    """
    if not is_sound(logits):
        raise RequestFailed(NO_NUMBERS)
    changed = _weighed(logits, how, row)
    ids = np.flatnonzero(_is_allowed(how, row, logits.size)) if how.allowed else None
    if ids is not None:  # they may be few, and all that follows is only about them
        changed = changed[ids]
    if not is_sound(changed):
        raise RequestFailed(NONE_LEFT)
    place = choose(changed, how.params, how.uniforms[row])
    return place if ids is None else int(ids[place])


def is_sound(logits: Logits) -> bool:
    """Whether something can be chosen: there is a greatest, it is finite, and none is NaN."""
    return logits.size > 0 and bool(np.isfinite(logits.max()))


def adjust(logits: Logits, how: Draw, row: int = 0) -> Logits:
    """Logits with penalties, bias and mask applied; those that came in are left alone."""
    changed = _weighed(logits, how, row)
    if how.allowed:
        return np.where(_is_allowed(how, row, logits.size), changed, np.float32(-np.inf))
    return changed


def _weighed(logits: Logits, how: Draw, row: int) -> Logits:
    """With penalties and bias."""
    params = how.params
    if params.has_penalties:
        seen, counts = _history(how, row, logits.size)
        values = logits[seen]
        if params.repetition_penalty != 1.0:
            values = repetition_penalty(values, np.ones(1, np.bool_), params.repetition_penalty)
        logits = logits.copy()
        logits[seen] = count_penalties(
            values, counts, params.presence_penalty, params.frequency_penalty
        )
    if params.logit_bias:
        logits = add_bias(logits, params.logit_bias)
    return logits


def _is_allowed(how: Draw, row: int, vocab_size: int) -> npt.NDArray[np.bool_]:
    num_bytes = len(how.allowed) // len(how.uniforms)
    bits = np.frombuffer(how.allowed, np.uint8, num_bytes, row * num_bytes)
    return np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)


def choose(logits: Logits, params: SamplingParams, uniform: float) -> int:
    """The most likely token at temperature 0, else the one of the final distribution."""
    if params.temperature == 0:
        return int(logits.argmax())
    return token_at(final(logits, params), uniform)


def final(logits: Logits, params: SamplingParams) -> Logits:
    """Logits of the distribution to choose from: temperature, top-k, top-p and min-p applied."""
    if params.temperature == 0:
        return keep_most_likely(logits)
    logits = scale_temperature(logits, params.temperature)
    if params.top_k > 0:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    return logits


def token_at(logits: Logits, uniform: float) -> int:
    """The token at which the cumulative probability passes `uniform`, in [0, 1)."""
    # Sums of blocks first, then inside one: adding up the whole vocabulary in turn takes six times
    # as long. In float64: other processors' exponentials and sums differ by less than a draw shows.
    is_left = logits > -np.inf
    ids = None if is_left.all() else np.flatnonzero(is_left)
    left = logits if ids is None else logits[ids]  # of filtered ones, few are
    shifted = left - left.max()
    sums = np.concatenate(
        [_block_sums(shifted[start : start + _CHUNK]) for start in range(0, left.size, _CHUNK)]
    )
    ends = np.cumsum(sums)
    target = uniform * ends[-1]
    block = _first_above(ends, target, sums)
    rest = max(target - (ends[block] - sums[block]), 0.0)
    weights = _weights(shifted[block * _BLOCK : (block + 1) * _BLOCK])
    place = block * _BLOCK + _first_above(np.cumsum(weights), rest, weights)
    return place if ids is None else int(ids[place])


def _weights(shifted: Logits) -> Weights:
    return np.exp(shifted.astype(np.float64))


def _block_sums(shifted: Logits) -> Weights:
    weights = np.zeros(-(-shifted.size // _BLOCK) * _BLOCK)
    weights[: shifted.size] = _weights(shifted)
    sums: Weights = weights.reshape(-1, _BLOCK).sum(axis=1)
    return sums


def _first_above(cumulative: Weights, target: float, weights: Weights) -> int:
    """The first index whose sum is above `target`; the last with a weight if rounding passed it.

    A sum strictly above the one before it has a weight of its own: no masked token is drawn.
    """
    index = int(np.searchsorted(cumulative, target, side="right"))
    return index if index < cumulative.size else int(np.flatnonzero(weights)[-1])


class Text:
    """The tokens of a prompt and of what follows it, in an array with room for more."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._ids = np.array(prompt_ids, np.uint32)
        self._length = self._ids.size

    @property
    def ids(self) -> TokenIds:
        """All tokens, [n], until the next is added."""
        return self._ids[: self._length]

    def add(self, token_id: int) -> None:
        """Take a generated token."""
        if self._length == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros(max(self._length, 64), np.uint32)])
        self._ids[self._length] = token_id
        self._length += 1


def _history(how: Draw, row: int, vocab_size: int) -> tuple[npt.NDArray[np.intp], Counts]:
    """Each token of the text once, and how often it was generated: 0 for one of the prompt's."""
    prompt = how.text[: how.num_prompt]
    generated = np.concatenate([how.text[how.num_prompt :], how.drafted[:row]]).astype(np.intp)
    counts = np.bincount(generated, minlength=vocab_size)
    is_seen = counts > 0
    is_seen[prompt] = True
    seen = np.flatnonzero(is_seen)
    return seen, counts[seen]
