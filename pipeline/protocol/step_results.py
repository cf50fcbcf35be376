"""What comes back for a step: the tensors, as its header asks for them, and how they are read."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import Floats
from pipeline.protocol.result_kinds import Result, Want
from pipeline.protocol.step_header import StepHeader
from pipeline.protocol.step_limits import (
    CLEAR_SPEC,
    MAX_LOGPROBS,
    SessionLimits,
    TokenIds,
    token_ids_from_wire,
    token_specs,
)
from transport.tensor_frames import DType, Tensor, TensorSpec

# Tokens, logits, rows, log-probabilities, most likely ids.
MAX_RESULT_TENSORS = 5

Logits = Floats


class Sizes(NamedTuple):
    """How much of each kind the wants of a step add up to."""

    tokens: int
    logits_rows: int
    hidden_rows: int
    logprobs: int
    top_ids: int


def result_sizes(wants: Sequence[Want]) -> Sizes:
    """What a step's segments want together."""
    tokens = logits = hidden = logprobs = top_ids = 0
    for want in wants:
        tokens += want.num_tokens
        logits += want.rows if want.result is Result.LOGITS else 0
        hidden += want.rows if want.result is Result.HIDDEN else 0
        logprobs += want.num_logprobs
        top_ids += want.rows * want.top
    return Sizes(tokens, logits, hidden, logprobs, top_ids)


def expected_results(
    header: StepHeader, vocab_size: int, hidden_dim: int
) -> tuple[TensorSpec, ...]:
    """The tensors the last stage returns for a step, in this order, those of no size left out.

    Tokens are always there: U32 [tokens], F32 [rows, vocab], F32 [rows, hidden], F32
    [log-probabilities], U32 [most likely ids]. A step without tokens returns its sentinel.
    """
    if not header.carries_tokens:
        return (CLEAR_SPEC,)
    wants = header.wants
    if all(want == Want.TOKEN for want in wants):
        return token_specs(len(wants))
    sizes = result_sizes(wants)
    more = (
        TensorSpec(DType.F32, (sizes.logits_rows, vocab_size)),
        TensorSpec(DType.F32, (sizes.hidden_rows, hidden_dim)),
        TensorSpec(DType.F32, (sizes.logprobs,)),
        TensorSpec(DType.U32, (sizes.top_ids,)),
    )
    return (*token_specs(sizes.tokens), *(spec for spec in more if spec.shape[0]))


def max_result_bytes(limits: SessionLimits, vocab_size: int) -> int:
    """Most bytes of tensors that a result of this session may have."""
    per_token = DType.U32.itemsize + DType.F32.itemsize * limits.codec.hidden_dim
    logits = limits.max_whole_rows * vocab_size * DType.F32.itemsize
    return limits.max_step_tokens * per_token + logits + 2 * MAX_LOGPROBS * DType.F32.itemsize


class SegmentResult(NamedTuple):
    """What came back for one segment; only what it wanted is of any size.

    Shapes: token_ids [rows]; logits [rows, vocab]; hidden [rows, hidden]; logprobs
    [rows, ids + top], in the order of the ids and then of `top_ids` [rows, top].
    """

    token_ids: list[int]
    logits: Logits | None
    hidden: Floats | None
    logprobs: Floats
    top_ids: TokenIds


class StepResult(NamedTuple):
    """What came back for a step: see `expected_results`. Arrays are valid until the next result."""

    header: StepHeader
    token_ids: list[int]
    logits: Logits | None = None
    hidden: Floats | None = None
    logprobs: Floats | None = None
    top_ids: TokenIds | None = None
    # What its step has cost where the ends of the model are held, by part, nanoseconds.
    home_times: dict[str, int] | None = None

    def all_ids(self) -> list[int]:
        """Every id that has come back, to be held against the vocabulary."""
        return self.token_ids + ([] if self.top_ids is None else self.top_ids.tolist())

    def segments(self) -> Iterator[SegmentResult]:
        """The part of each segment that wanted something, in order."""
        token = row = hidden_row = score = top_id = 0
        for want in self.header.wants:
            result, rows, top, _ = want
            if result is Result.NOTHING:
                continue
            token_ids = self.token_ids[token : token + want.num_tokens]
            token += len(token_ids)
            logits = hidden = None
            if result is Result.LOGITS and self.logits is not None:
                logits = self.logits[row : row + rows]
                row += rows
            if result is Result.HIDDEN and self.hidden is not None:
                hidden = self.hidden[hidden_row : hidden_row + rows]
                hidden_row += rows
            logprobs, top_ids = np.empty((rows, 0), np.float32), np.empty((rows, 0), np.uint32)
            if want.num_logprobs and self.logprobs is not None:
                logprobs = self.logprobs[score : score + want.num_logprobs].reshape(rows, -1)
                score += want.num_logprobs
            if top and self.top_ids is not None:
                top_ids = self.top_ids[top_id : top_id + rows * top].reshape(rows, -1)
                top_id += rows * top
            yield SegmentResult(token_ids, logits, hidden, logprobs, top_ids)


def result_to_wire(
    tokens: Sequence[int], *, logits: Floats, hidden: Floats, logprobs: Floats, top_ids: TokenIds
) -> tuple[Tensor, ...]:
    """The tensors of a result; see `expected_results`."""
    found = [np.asarray(tokens, "<u4")]
    found += [each for each in (logits, hidden, logprobs, top_ids) if len(each)]
    return tuple([_tensor(each) for each in found])


def _tensor(array: npt.NDArray[np.generic]) -> Tensor:
    dtype = DType.F32 if array.dtype == np.float32 else DType.U32
    rows = np.ascontiguousarray(array, "<f4" if dtype is DType.F32 else "<u4")
    return Tensor(TensorSpec(dtype, rows.shape), rows.data.cast("B"))


def step_result(header: StepHeader, tensors: Sequence[Tensor]) -> StepResult:
    """Read the last stage's tensors, whose specs have been checked."""
    token_ids = token_ids_from_wire(tensors[0]).tolist()
    if len(tensors) == 1:
        return StepResult(header, token_ids)
    sizes = result_sizes(header.wants)
    rest = [
        np.frombuffer(tensor.data, "<f4" if tensor.spec.dtype is DType.F32 else "<u4").reshape(
            tensor.spec.shape
        )
        for tensor in tensors[1:]
    ]
    logits, hidden, logprobs, top_ids = [rest.pop(0) if size else None for size in sizes[1:]]
    return StepResult(header, token_ids, logits, hidden, logprobs, top_ids)
