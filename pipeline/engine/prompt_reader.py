"""What the rows of a prompt itself tell: what its tokens' probabilities are, or what it means."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import Floats
from pipeline.errors import RequestFailed
from pipeline.protocol.result_kinds import NO_TOKEN, Result, Want
from pipeline.protocol.step_results import SegmentResult
from pipeline.sampling.draw import NO_NUMBERS

# Rows of prompts that one step may bring back: with the most likely ids that can be asked for, half
# of the log-probabilities that a step may have.
MAX_READ_TOKENS = 1 << 11


class PromptReader(Protocol):
    """Takes what comes back for a prompt's rows, in order.

    Rows that stages have lost come again, the same.
    """

    @property
    def num_rows(self) -> int:
        """So many of the prompt's first tokens are read; each has to be computed for it."""
        ...

    def want(self, start: int, end: int) -> Want:
        """What the last stage is to return for the tokens at these positions."""
        ...

    def given(self, start: int, end: int) -> tuple[int, ...]:
        """The ids to score for them."""
        ...

    def take(self, position: int, part: SegmentResult) -> None:
        """What has come for the tokens from `position` on. Raises RequestFailed."""
        ...


class TokenScore(NamedTuple):
    """A token's log-probability, and (token id, log-probability) of the likeliest in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class PromptScores:
    """The log-probability of each of a prompt's tokens but the first, behind those before it."""

    def __init__(self, prompt_ids: Sequence[int], num_top: int) -> None:
        self._prompt_ids = tuple(prompt_ids)
        self._num_top = num_top
        self._logprobs = np.full((self.num_rows, 1 + num_top), np.nan, np.float32)
        self._top_ids = np.full((self.num_rows, num_top), NO_TOKEN, np.uint32)

    @property
    def num_rows(self) -> int:
        """Nothing of the prompt comes behind its last token."""
        return len(self._prompt_ids) - 1

    def want(self, start: int, end: int) -> Want:
        """See `PromptReader`."""
        return Want(Result.LOGPROBS, end - start, self._num_top, 1)

    def given(self, start: int, end: int) -> tuple[int, ...]:
        """Of each token the one behind it."""
        return self._prompt_ids[start + 1 : end + 1]

    def take(self, position: int, part: SegmentResult) -> None:
        """See `PromptReader`. Raises RequestFailed."""
        if np.isnan(part.logprobs).any():
            raise RequestFailed(NO_NUMBERS)
        end = position + len(part.logprobs)
        self._logprobs[position:end] = part.logprobs
        self._top_ids[position:end] = part.top_ids

    def at(self, index: int, num_top: int | None = None) -> TokenScore:
        """Of the prompt's token of this index, from 1 on, once all have come.

        `num_top`: so many of the likeliest, rather than all that were asked for.
        """
        logprob, *rest = self._logprobs[index - 1].tolist()
        top = zip(self._top_ids[index - 1].tolist(), rest, strict=True)
        likeliest = tuple(each for each in top if each[0] != NO_TOKEN)
        return TokenScore(self._prompt_ids[index], logprob, likeliest[:num_top])


class PromptMeaning:
    """The last layer's rows of a prompt in one: their mean, or the last; of length 1.

    Each row counts as the final norm would have it, but for that norm's gains: in most models the
    first token's row is a thousand times as long as any other, and means nothing.
    """

    def __init__(self, num_tokens: int, *, is_mean: bool) -> None:
        self._num_tokens = num_tokens
        self._is_mean = is_mean
        self._num_taken = 0
        self._sum: npt.NDArray[np.float64] | None = None

    @classmethod
    def of(cls, prompt_ids: Sequence[int], *, is_mean: bool) -> "PromptMeaning":
        """Of this prompt."""
        return cls(len(prompt_ids), is_mean=is_mean)

    @property
    def num_rows(self) -> int:
        """All of it."""
        return self._num_tokens

    def want(self, start: int, end: int) -> Want:
        """See `PromptReader`."""
        if self._is_mean:
            return Want(Result.HIDDEN, end - start)
        return Want.HIDDEN if end == self._num_tokens else Want.NOTHING

    def given(self, start: int, end: int) -> tuple[int, ...]:
        """Nothing is scored."""
        del start, end
        return ()

    def take(self, position: int, part: SegmentResult) -> None:
        """See `PromptReader`. Raises RequestFailed."""
        assert part.hidden is not None  # results are read as their header says
        if not np.isfinite(part.hidden).all():
            raise RequestFailed(NO_NUMBERS)
        # One after another: in what chunks a prompt was read may not change the sum's last bits.
        for row in part.hidden[max(0, self._num_taken - position) :].astype(np.float64):
            unit = row / (np.sqrt(np.mean(row * row)) or 1.0)
            self._sum = unit if self._sum is None else self._sum + unit
        self._num_taken = max(self._num_taken, position + len(part.hidden))

    def vector(self, size: int | None = None) -> Floats:
        """Once all have come, F32 [hidden]; or its first `size` numbers, of length 1 themselves."""
        assert self._sum is not None  # a prompt has a token
        kept = self._sum[:size]
        unit: Floats = (kept / (np.sqrt(np.sum(kept * kept)) or 1.0)).astype(np.float32)
        return unit
