"""Which tokens may come next. Masks apply before temperature and filters."""

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pipeline.sampling.params import SamplingParams

Allowed = npt.NDArray[np.bool_]


class Mask(Protocol):
    """What users plug in, a grammar say; a function of the text, so one serves many requests."""

    def allowed(self, generated: Sequence[int], vocab_size: int, /) -> Allowed | None:
        """For each token whether it may follow those generated so far, [vocab]; None: all may."""
        ...


@runtime_checkable
class PackedMask(Mask, Protocol):
    """One that has its answer as bits, as it travels, and need not take them apart."""

    def packed(self, generated: Sequence[int], vocab_size: int, /) -> bytes | None:
        """As `allowed`, a bit a token, lowest first."""
        ...


class AllowedTokens:
    """Only these tokens, from the first to the last."""

    def __init__(self, token_ids: Collection[int]) -> None:
        self._token_ids = list(token_ids)
        self._allowed = np.zeros(0, np.bool_)

    def allowed(self, _generated: Sequence[int], vocab_size: int, /) -> Allowed | None:
        """As `Mask.allowed`."""
        if self._allowed.size != vocab_size:
            self._allowed = _marked(self._token_ids, vocab_size)
        return self._allowed


class NoEndBefore:
    """No token that ends the text before `num_tokens` have been generated."""

    def __init__(self, num_tokens: int, end_ids: Collection[int]) -> None:
        self._num_tokens = num_tokens
        self._end_ids = list(end_ids)

    def allowed(self, generated: Sequence[int], vocab_size: int, /) -> Allowed | None:
        """As `Mask.allowed`."""
        if len(generated) >= self._num_tokens or not self._end_ids:
            return None
        return ~_marked(self._end_ids, vocab_size)


class NotThese:
    """None of these sequences of tokens: of each the last is not allowed behind the others."""

    def __init__(self, sequences: Collection[Sequence[int]]) -> None:
        self._sequences = [tuple(each) for each in sequences if each]

    def allowed(self, generated: Sequence[int], vocab_size: int, /) -> Allowed | None:
        """As `Mask.allowed`."""
        most = max((len(each) for each in self._sequences), default=1) - 1
        end = tuple(generated[len(generated) - most :] if most else ())
        ended = [e[-1] for e in self._sequences if e[:-1] == end[len(end) - len(e) + 1 :]]
        return ~_marked(ended, vocab_size)


def masks_of(params: SamplingParams, end_ids: Collection[int]) -> tuple[Mask, ...]:
    """The masks that a request's parameters stand for; `end_ids` are the tokens that end it."""
    masks: list[Mask] = []
    if params.allowed_token_ids is not None:
        masks.append(AllowedTokens(params.allowed_token_ids))
    if params.min_tokens:
        masks.append(NoEndBefore(params.min_tokens, end_ids))
    return tuple(masks)


def _marked(token_ids: Sequence[int], vocab_size: int) -> Allowed:
    marked = np.zeros(vocab_size, np.bool_)
    ids = np.array(token_ids, np.intp)
    marked[ids[ids < vocab_size]] = True
    return marked
