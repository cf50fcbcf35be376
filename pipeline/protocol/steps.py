"""What a step may be: the limits of a session, and the tensors that go with a header."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.codecs.base import ActivationCodec
from pipeline.errors import MessageError
from pipeline.protocol.messages import StepHeader, StepKind
from transport.frames import DType, Tensor, TensorSpec

TokenIds = npt.NDArray[np.uint32]
CLEAR_SPEC = TensorSpec(DType.U32, (0,))
CLEAR_SENTINEL = Tensor(CLEAR_SPEC, memoryview(b""))


Logits = npt.NDArray[np.float32]


class StepResult(NamedTuple):
    """What came back for a step: a token per segment that wants any, logits for those that do.

    Shapes: token_ids [segments that want something]; logits [segments that want logits, vocab],
    valid until the next result.
    """

    header: StepHeader
    token_ids: list[int]
    logits: Logits | None = None


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What a session agreed on; every step is held against it before its tensor is stored."""

    num_slots: int
    max_seq_len: int
    max_step_tokens: int
    # How activations travel, and how wide they are.
    codec: ActivationCodec

    @property
    def max_tensor_bytes(self) -> int:
        """Most bytes of tensors a step may carry between stages."""
        activations = sum(spec.nbytes for spec in self.codec.specs(self.max_step_tokens))
        return max(activations, self.max_step_tokens * DType.U32.itemsize)


@lru_cache(maxsize=256)
def token_specs(num_tokens: int) -> tuple[TensorSpec, ...]:
    """The tensor that as many token ids travel in."""
    return (TensorSpec(DType.U32, (num_tokens,)),)


def check_header(header: StepHeader, limits: SessionLimits) -> None:
    """Refuse a step that names slots, positions or sizes the session has no room for."""
    kind, step, segments, wants, _, _ = header
    if not segments:
        raise MessageError(f"step {step} has no segments")
    if len({slot for slot, _, _ in segments}) != len(segments):
        raise MessageError(f"step {step} names a slot twice")
    is_clear = kind is StepKind.CLEAR
    total = 0
    for slot, position, num_tokens in segments:
        if slot >= limits.num_slots:
            raise MessageError(f"step {step} names slot {slot}, there are {limits.num_slots}")
        end = position + num_tokens
        if end > limits.max_seq_len:
            raise MessageError(
                f"step {step} reaches position {end}, the context is {limits.max_seq_len}"
            )
        if (num_tokens == 0) is not is_clear:
            raise MessageError(f"step {step} has a segment of {num_tokens} tokens")
        total += num_tokens
    if kind is StepKind.REPLAY and any(wants):
        raise MessageError(f"replayed step {step} wants a result")
    if total > limits.max_step_tokens:
        raise MessageError(f"step {step} has {total} tokens, the limit is {limits.max_step_tokens}")


def expected_inputs(
    header: StepHeader, limits: SessionLimits, *, is_first: bool
) -> tuple[TensorSpec, ...]:
    """The tensors a stage takes with this header."""
    if header.kind is StepKind.CLEAR:
        return (CLEAR_SPEC,)
    if is_first:
        return token_specs(header.num_tokens)
    return limits.codec.specs(header.num_tokens)


def token_ids_to_wire(token_ids: Sequence[int] | TokenIds) -> Tensor:
    """Token ids as a U32 tensor of their number."""
    array = np.ascontiguousarray(token_ids, dtype="<u4")
    return Tensor(token_specs(array.size)[0], array.data.cast("B"))


def token_ids_from_wire(tensor: Tensor) -> TokenIds:
    """A U32 tensor's token ids. Raises MessageError for another dtype or rank."""
    if tensor.spec.dtype is not DType.U32 or len(tensor.spec.shape) != 1:
        raise MessageError(f"token ids arrived as {tensor.spec.dtype.name}{tensor.spec.shape}")
    return np.frombuffer(tensor.data, dtype="<u4")


def logits_to_wire(logits: Logits) -> Tensor:
    """Logits [n, vocab] as an F32 tensor."""
    rows = np.ascontiguousarray(logits, dtype="<f4")
    return Tensor(TensorSpec(DType.F32, rows.shape), rows.data.cast("B"))


def step_result(header: StepHeader, tensors: Sequence[Tensor]) -> StepResult:
    """Read the last stage's tensors, whose specs have been checked."""
    token_ids = token_ids_from_wire(tensors[0]).tolist()
    if len(tensors) == 1:
        return StepResult(header, token_ids)
    logits = np.frombuffer(tensors[1].data, dtype="<f4").reshape(tensors[1].spec.shape)
    return StepResult(header, token_ids, logits)
