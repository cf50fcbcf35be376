"""An engine's logits, on whatever device, as what a token is chosen from; and one token forced."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipeline.sampling.draw import final, is_sound
from pipeline.sampling.filters import Logits
from pipeline.sampling.params import SamplingParams
from pipeline.stego.errors import StegoError, Unreadable
from pipeline.stego.token_weights import TokenWeights, token_weights

EngineLogits: TypeAlias = torch.Tensor | npt.NDArray[np.floating]
Ids: TypeAlias = npt.NDArray[np.int64]

_DEFAULT = SamplingParams(temperature=1.0, top_k=50)
_NO_NUMBERS = "no token can be chosen: the engine's logits are no numbers, or all are masked"


@dataclass(frozen=True, slots=True)
class Conditioning:
    """How logits become a distribution; both ends of a message must do it alike.

    `params` counts with its temperature, top-k, top-p and min-p; `excluded` tokens are never
    chosen, such as those that end a text. Raises StegoError where nothing could be hidden.
    """

    params: SamplingParams = _DEFAULT
    excluded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.params.temperature == 0 or self.params.top_k == 1:
            raise StegoError(
                "only the most likely token would be left to choose from; give a temperature "
                "above 0, and a top-k of 0 or above 1"
            )
        if min(self.excluded, default=0) < 0:
            raise StegoError(f"there is no token {min(self.excluded)} to exclude")


def conditional(logits: EngineLogits, how: Conditioning) -> TokenWeights:
    """The distribution of the next token, after all filters.

    Shapes: logits [vocab], left as they are. With top-k only its tokens leave the device. Raises
    StegoError for logits that are no numbers.
    """
    ids, values = _candidates(logits, how)
    if not is_sound(values):
        raise StegoError(_NO_NUMBERS)
    kept = token_weights(final(values, how.params))
    return TokenWeights(ids[kept.ids], kept.weights, kept.total)


def index_of(weights: TokenWeights, token_id: int) -> int:
    """A token's place among those that may come next. Raises Unreadable where it may not."""
    index = int(np.searchsorted(weights.ids, token_id))
    if index == weights.ids.size or weights.ids[index] != token_id:
        raise Unreadable
    return index


def force(logits: EngineLogits, token_id: int) -> None:
    """Leave the engine no other token, in place. Shape: [vocab]."""
    logits[:] = -np.inf
    logits[token_id] = 0.0


def _candidates(logits: EngineLogits, how: Conditioning) -> tuple[Ids, Logits]:
    """All that can pass the filters, among others; ids in rising order."""
    row = torch.as_tensor(logits).detach().float()
    if row.ndim != 1:
        raise StegoError(f"one token's logits have one dimension, not {row.ndim}")
    excluded = [each for each in how.excluded if each < row.numel()]
    if excluded:
        row = row.index_fill(0, torch.tensor(excluded, device=row.device), -torch.inf)
    if 0 < how.params.top_k < row.numel():
        least = torch.topk(row, how.params.top_k).values[-1]
        # Every token as likely as the last: of those the lower ids stay, which topk does not say.
        # Negated, so that no comparison with what is no number drops it unseen.
        ids = torch.nonzero(~(row < least)).flatten()
        return ids.cpu().numpy(), row[ids].cpu().numpy()
    return np.arange(row.numel(), dtype=np.int64), row.cpu().numpy()
