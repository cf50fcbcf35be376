"""Writer and reader of a text as what chooses an engine's tokens. Each serves one request."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.sampling.choosers import Chooser, Distribution
from pipeline.stego.cover import CoverReader, CoverWriter
from pipeline.stego.errors import StegoError, Unreadable
from pipeline.stego.statistics import StepRecord
from pipeline.stego.token_weights import TokenWeights, token_weights


class WritingChooser(Chooser):
    """Chooses tokens that carry a message. Once it is done, what it chooses is of no account."""

    def __init__(self, writer: CoverWriter) -> None:
        self.writer = writer
        self.token_ids: list[int] = []
        self.steps: list[StepRecord] = []
        # Of the tokens that a reader needs.
        self.num_needed = 0

    @property
    def is_over(self) -> bool:
        """Whether the text is whole."""
        return self.writer.is_done

    def choose(self, final: Distribution) -> int:
        """As `Chooser.choose`."""
        if self.writer.is_done:  # a step that was under way when nobody could know
            return final.most_likely
        weights = token_weights(final.logits)
        before = self.writer.progress.carried
        is_needed = not self.writer.is_certain
        token_id = int(weights.ids[self.writer.choose(weights)])
        self.token_ids.append(token_id)
        self.num_needed += is_needed
        self.steps.append(StepRecord.of(final, weights, self.writer.progress.carried - before))
        return token_id


class ReadingChooser(Chooser):
    """Chooses a text's own tokens and learns from them; and those of its tail, which it knows.

    `failure` says why the text has no message, if so; what it chooses from then on is of no
    account.
    """

    def __init__(self, reader: CoverReader, token_ids: Sequence[int]) -> None:
        self.reader = reader
        self.failure: StegoError | None = None
        self.token_ids: list[int] = []
        self.steps: list[StepRecord] = []
        self._given = token_ids

    @property
    def is_over(self) -> bool:
        """Whether all is known: the whole text, or that it has no message."""
        return self.failure is not None or self.reader.is_done

    def choose(self, final: Distribution) -> int:
        """As `Chooser.choose`."""
        if self.is_over:
            return final.most_likely
        weights = token_weights(final.logits)
        before = self.reader.progress.carried
        try:
            index = self._next(weights)
            self.reader.observe(weights, index)
        except StegoError as error:
            self.failure = error
            return final.most_likely
        self.token_ids.append(int(weights.ids[index]))
        carried = self.reader.progress.carried - before
        self.steps.append(StepRecord.of(final, weights, carried))
        return self.token_ids[-1]

    def _next(self, weights: TokenWeights) -> int:
        """The next token's index. Raises StegoError if the text has ended, or cannot go on so."""
        if self.reader.is_certain:
            return self.reader.expected(weights)
        if len(self.token_ids) == len(self._given):
            raise Unreadable
        return _index_of(weights.ids, self._given[len(self.token_ids)])


def _index_of(ids: npt.NDArray[np.int64], token_id: int) -> int:
    index = int(np.searchsorted(ids, token_id))
    if index == ids.size or ids[index] != token_id:
        raise Unreadable
    return index
