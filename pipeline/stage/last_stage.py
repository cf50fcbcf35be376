"""What the last stage makes of its rows: tokens, logits, log-probabilities, drawn tokens."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.dtypes import Array, Floats
from pipeline.errors import RequestFailed
from pipeline.kernels.base import Kernels
from pipeline.models.model_config import ModelConfig
from pipeline.protocol.last_stage_inputs import Asked
from pipeline.protocol.result_kinds import NO_TOKEN, Result, Want
from pipeline.protocol.step_header import StepHeader
from pipeline.protocol.step_limits import token_ids_to_wire
from pipeline.protocol.step_results import Sizes, result_sizes, result_to_wire
from pipeline.sampling.draw import Draw, draw, is_sound
from pipeline.sampling.filters import log_softmax, most_likely
from transport.tensor_frames import Tensor

# Logits exist for so many rows at a time, however long the prompts that are scored.
BLOCK_ROWS = 256


class Head(Protocol):
    """What makes logits of rows: the last shard of a model."""

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        ...

    @property
    def kernels(self) -> Kernels:
        """What computes."""
        ...

    def results(self, hidden: Array) -> tuple[Array, Array]:
        """Greedy token of each row, and logits."""
        ...


class Scored(NamedTuple):
    """A row's most likely token, NO_TOKEN where it has none, and its logits [vocab] if needed."""

    token_id: int
    logits: Floats | None


def step_results(
    shard: Head, header: StepHeader, asked: Asked, hidden: Array
) -> tuple[Tensor, ...]:
    """The results of a step from all its rows, [rows, hidden], where the kernels compute."""
    kernels = shard.kernels
    scored: list[tuple[int, bool]] = []
    returned: list[int] = []
    end = 0
    for segment, want in zip(header.segments, header.wants, strict=True):
        end += segment.num_tokens
        rows = range(end - want.rows, end)
        if want.result is Result.HIDDEN:
            returned += rows
        else:
            scored += [(row, want.result is not Result.TOKEN) for row in rows]
    if all(want == Want.TOKEN for want in header.wants):
        some = [row for row, _ in scored]
        chosen, _ = shard.results(_rows(shard, hidden, some))
        return (token_ids_to_wire(kernels.to_host(chosen)[0].astype(np.uint32)),)
    kept = np.empty((0, 0), np.float32)
    if returned:
        (kept,) = kernels.to_host(_rows(shard, hidden, returned))
    return results_of(header, asked, _scored(shard, hidden, scored), shard.config.vocab_size, kept)


def results_of(
    header: StepHeader, asked: Asked, scored: Iterable[Scored], vocab_size: int, hidden: Floats
) -> tuple[Tensor, ...]:
    """The results of a step from its rows: those `scored` in order, and those to return as is."""
    answer = _Answer(result_sizes(header.wants), vocab_size)
    rows, draws, given = iter(scored), iter(asked.draws), iter(asked.token_ids)
    for want in header.wants:
        if want.result in _AS_IT_IS:
            continue
        how = next(draws) if want.result is Result.DRAWN else None
        for index in range(want.rows):
            token_id, logits = next(rows)
            if logits is None:
                answer.tokens.append(token_id)
                continue
            ids = [next(given) for _ in range(want.num_ids)] if how is None else []
            answer.add(want, logits, how, index, ids)
    return result_to_wire(
        answer.tokens,
        logits=answer.logits,
        hidden=hidden,
        logprobs=np.array(answer.logprobs, np.float32),
        top_ids=np.array(answer.top_ids, np.uint32),
    )


_AS_IT_IS = frozenset({Result.NOTHING, Result.HIDDEN})


class _Answer:
    """Results as they come together, row by row."""

    def __init__(self, sizes: Sizes, vocab_size: int) -> None:
        self.tokens: list[int] = []
        self.logits = np.empty((sizes.logits_rows, vocab_size), np.float32)
        self.logprobs: list[float] = []
        self.top_ids: list[int] = []
        self._num_rows = 0

    def add(self, want: Want, logits: Floats, how: Draw | None, index: int, ids: list[int]) -> None:
        """A row's part: what `want` says, drawn as `how` says, or with `ids` to score."""
        if want.result is Result.LOGITS:
            self.logits[self._num_rows] = logits
            self._num_rows += 1
            return
        if how is not None:
            try:
                token_id = draw(logits, how, index)
            except RequestFailed:  # the reason is the request's own, and so is its end
                token_id = NO_TOKEN
            self.tokens.append(token_id)
            ids = [token_id] * want.num_ids
        if ids or want.top:
            self._score(logits, ids, want.top)

    def _score(self, logits: Floats, ids: list[int], num_top: int) -> None:
        """Log-probabilities of `ids`, and of the most likely tokens; NaN where there are none."""
        if NO_TOKEN in ids or not is_sound(logits):
            self.logprobs += [np.nan] * (len(ids) + num_top)
            self.top_ids += [NO_TOKEN] * num_top
            return
        logprobs = log_softmax(logits)
        top = most_likely(logits, num_top).tolist()
        num_missing = num_top - len(top)
        self.logprobs += [*logprobs[[*ids, *top]].tolist(), *[-np.inf] * num_missing]
        self.top_ids += [*top, *[NO_TOKEN] * num_missing]


def _scored(shard: Head, hidden: Array, rows: list[tuple[int, bool]]) -> Iterator[Scored]:
    """The tokens of rows of the last layer's output, with logits for those that need them."""
    kernels = shard.kernels
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        chosen, logits = shard.results(_rows(shard, hidden, [row for row, _ in block]))
        needed = [at for at, (_, needs) in enumerate(block) if needs]
        if len(needed) < len(block):
            logits = logits[kernels.to_device(np.array(needed, np.int64))]
        tokens, found = kernels.to_host(chosen, logits)
        each = iter(found)
        for token_id, (_, needs) in zip(tokens.astype(np.uint32).tolist(), block, strict=True):
            yield Scored(token_id, next(each) if needs else None)


def _rows(shard: Head, hidden: Array, rows: list[int]) -> Array:
    if len(rows) == hidden.shape[0]:
        return hidden
    return hidden[shard.kernels.to_device(np.array(rows, np.int64))]
