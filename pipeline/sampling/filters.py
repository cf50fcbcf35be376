"""What changes logits before a token is chosen: each a plain function, none changes its input.

Shapes: logits are float32 `[vocab]`. A token that may not be chosen has the logit -inf; every
filter keeps at least the most likely token. Between equal logits the lower token id goes first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

# Below this the most likely token's rivals vanish in float32 anyway, while the quotient overflows.
MIN_TEMPERATURE = 1e-5
# Above this it is infinite in float32, and what is masked would come out as no number.
MAX_TEMPERATURE = float(np.finfo(np.float32).max)
# Filters look at the tokens within these distances of the most likely first: a comparison costs a
# tenth of sorting, and what has less than exp(-16) of its probability rarely matters.
_DEPTHS = (4.0, 6.0, 8.0, 10.0, 12.0, 16.0)


class LogitsProcessor(Protocol):
    """What users plug in: new logits from those of the model and every token so far."""

    def __call__(self, token_ids: Sequence[int], logits: Logits) -> Logits:
        """`token_ids` is the prompt and what was generated; the result has the logits' shape."""
        ...


def repetition_penalty(logits: Logits, is_seen: npt.NDArray[np.bool_], penalty: float) -> Logits:
    """Make tokens of the prompt and the text so far less likely (Keskar et al. 2019, CTRL)."""
    scale = np.float32(penalty)
    return np.where(is_seen, np.where(logits > 0, logits / scale, logits * scale), logits)


def count_penalties(
    logits: Logits, counts: npt.NDArray[np.integer[Any]], presence: float, frequency: float
) -> Logits:
    """Subtract `presence` from each generated token and `frequency` times how often it was."""
    penalties = np.float32(presence) * (counts > 0) + np.float32(frequency) * counts
    changed: Logits = logits - penalties.astype(np.float32)
    return changed


def add_bias(logits: Logits, bias: Mapping[int, float]) -> Logits:
    """Add to single tokens' logits; on a token the model does not have, it changes nothing."""
    biased = logits.copy()
    for token_id, value in bias.items():
        if token_id < logits.size:
            biased[token_id] += np.float32(value)
    return biased


def scale_temperature(logits: Logits, temperature: float) -> Logits:
    """Divide by the temperature; the most likely token's logit becomes 0, so nothing overflows."""
    with np.errstate(over="ignore"):  # too unlikely to be told from impossible
        scale = np.float32(min(max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE))
        scaled: Logits = (logits - logits.max()) / scale
    return scaled


def keep_most_likely(logits: Logits) -> Logits:
    """Keep the most likely token alone."""
    return _only(logits, np.array([logits.argmax()]))


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Keep the `k` most likely tokens."""
    return logits if k >= logits.size else _only(logits, _most_likely(logits, k))


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest most likely tokens that have at least probability `p` together.

    Source: Holtzman et al. 2019, nucleus sampling.
    """
    weights = np.exp(logits - logits.max())
    target = p * weights.sum(dtype=np.float64)
    head = _head(logits, lambda ids: bool(weights[ids].sum(dtype=np.float64) >= target))
    # Sorting values is ten times as fast as sorting ids by value.
    values = np.sort(logits[head])[::-1]
    mass = np.cumsum(np.exp(values - values[0]), dtype=np.float64)
    num = min(int(np.searchsorted(mass, target)) + 1, values.size)
    return _only(logits, _not_below(logits, values[num - 1], num))


def keep_min_p(logits: Logits, p: float) -> Logits:
    """Keep tokens at least `p` times as likely as the most likely (Nguyen et al. 2024)."""
    with np.errstate(divide="ignore"):  # below float32: all are as likely as that
        floor = logits.max() + np.log(np.float32(p))
    return np.where(logits < floor, np.float32(-np.inf), logits)


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Natural logarithm of each token's probability."""
    shifted = (logits - logits.max()).astype(np.float64)
    logprobs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return logprobs


def most_likely(logits: Logits, num: int) -> npt.NDArray[np.intp]:
    """The `num` most likely token ids, the likeliest first; all of them if there are fewer."""
    ids = _most_likely(logits, num) if num else np.empty(0, np.intp)
    return ids[np.argsort(-logits[ids], kind="stable")]


def _most_likely(logits: Logits, num: int) -> npt.NDArray[np.intp]:
    """The `num` most likely token ids, in order of id; `num` at least 1."""
    head = _head(logits, lambda ids: ids.size >= num)
    if num >= head.size:
        return head
    threshold = np.partition(logits[head], head.size - num)[head.size - num]
    return _not_below(logits, threshold, num)


def _not_below(logits: Logits, threshold: np.float32, num: int) -> npt.NDArray[np.intp]:
    """The `num` most likely token ids, in order of id, the least likely having `threshold`."""
    ids = np.flatnonzero(logits >= threshold)
    if ids.size == num:
        return ids
    is_tie = logits[ids] == threshold
    num_ties = num - (ids.size - int(is_tie.sum()))
    kept: npt.NDArray[np.intp] = ids[~is_tie | (np.cumsum(is_tie) <= num_ties)]
    return kept


def _head(
    logits: Logits, is_enough: Callable[[npt.NDArray[np.intp]], bool]
) -> npt.NDArray[np.intp]:
    """Ids of the most likely tokens, in order of id: as many as are enough, or all.

    What is left out is less likely than all that is in.
    """
    top = logits.max()
    for depth in _DEPTHS:
        head = np.flatnonzero(logits > top - np.float32(depth))
        if is_enough(head):
            return head
    return np.arange(logits.size)


def _only(logits: Logits, kept: npt.NDArray[np.intp]) -> Logits:
    masked = np.full_like(logits, -np.inf)
    masked[kept] = logits[kept]
    return masked
