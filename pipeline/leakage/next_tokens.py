"""What a language model expects behind a prefix: in which order an attacker tries candidates."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.leakage.candidate_states import CandidateStates
from pipeline.leakage.matching import Candidates
from pipeline.leakage.public_model import PublicModel

MAX_CANDIDATES = 512


class NextTokens:
    """The likeliest next tokens of prefixes, each asked of the model once."""

    def __init__(self, model: PublicModel, num_positions: int) -> None:
        self._model = model
        last = model.config.num_layers
        self._states = CandidateStates(model, last, 1, num_positions)
        # What ends a text stands before one as well.
        self._start = (*model.config.eos_token_ids, 0)[0]
        self._found: dict[tuple[int, ...], Candidates] = {}

    def likeliest(self, prefix: tuple[int, ...], count: int) -> Candidates:
        """So many of them, the likeliest first."""
        found = self._found.get(prefix)
        if found is None or len(found.ids) < count:
            found = self._ask(prefix, count)
            self._found[prefix] = found.part(0, MAX_CANDIDATES)
        return found.part(0, count)

    def _ask(self, prefix: tuple[int, ...], count: int) -> Candidates:
        *before, last = prefix or (self._start,)
        (logits,) = self._model.logits(self._states.rows(before, [last]))
        log_probabilities = log_softmax(logits)
        order = np.argsort(-log_probabilities, kind="stable")[: max(count, MAX_CANDIDATES)]
        return Candidates(order, log_probabilities[order])


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of each row, [..., vocab], in the precision it comes in."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: npt.NDArray[Any] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found
