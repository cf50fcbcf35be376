"""What a stage does with one step. Sans-IO: a header and a tensor in, a tensor out."""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import MessageError
from pipeline.messages import StepHeader, StepKind, Want
from pipeline.models.registry import ModelShard
from pipeline.tensors import (
    activation_from_wire,
    activation_to_wire,
    token_ids_from_wire,
    token_ids_to_wire,
)
from transport.frames import DType, Tensor, TensorSpec

CLEAR_SPEC = TensorSpec(DType.U32, (0,))
CLEAR_SENTINEL = Tensor(CLEAR_SPEC, memoryview(b""))


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What a session agreed on; every step is held against it before its tensor is stored."""

    num_slots: int
    max_seq_len: int
    max_step_tokens: int
    hidden_dim: int
    activation_dtype: DType

    @property
    def max_tensor_bytes(self) -> int:
        """Largest tensor a step may carry between stages."""
        width = self.hidden_dim * self.activation_dtype.itemsize
        return self.max_step_tokens * max(width, DType.U32.itemsize)


def check_header(header: StepHeader, limits: SessionLimits) -> None:
    """Refuse a step that names slots, positions or sizes the session has no room for."""
    slots = [segment.slot for segment in header.segments]
    if len(set(slots)) != len(slots):
        raise MessageError(f"step {header.step} names a slot twice")
    for segment in header.segments:
        if segment.slot >= limits.num_slots:
            raise MessageError(
                f"step {header.step} names slot {segment.slot}, there are {limits.num_slots}"
            )
        end = segment.position + segment.num_tokens
        if end > limits.max_seq_len:
            raise MessageError(
                f"step {header.step} reaches position {end}, the context is {limits.max_seq_len}"
            )
        if (segment.num_tokens == 0) is not (header.kind is StepKind.CLEAR):
            raise MessageError(f"step {header.step} has a segment of {segment.num_tokens} tokens")
    if header.num_tokens > limits.max_step_tokens:
        raise MessageError(
            f"step {header.step} has {header.num_tokens} tokens, "
            f"the limit is {limits.max_step_tokens}"
        )


def expected_input(header: StepHeader, limits: SessionLimits, *, is_first: bool) -> TensorSpec:
    """The one tensor a stage takes with this header."""
    if header.kind is StepKind.CLEAR:
        return CLEAR_SPEC
    if is_first:
        return TensorSpec(DType.U32, (header.num_tokens,))
    return TensorSpec(limits.activation_dtype, (header.num_tokens, limits.hidden_dim))


class StageCore:
    """A shard of layers with the KV state of one session."""

    def __init__(self, shard: ModelShard, limits: SessionLimits) -> None:
        self.shard = shard
        self.limits = limits
        self.cache = shard.new_cache(limits.num_slots, limits.max_seq_len)
        self._compute_dtype = shard.compute_dtype

    @torch.inference_mode()
    def step(self, header: StepHeader, tensor: Tensor) -> tuple[Tensor, ...]:
        """Run one step.

        Shapes: first stage U32 [tokens], others [tokens, hidden]; returns [tokens, hidden], or
        from the last stage U32 [segments that want a token] and, if any segment wants logits,
        F32 [those segments, vocab]. Raises MessageError when the step does not fit the KV state.
        """
        if header.kind is StepKind.CLEAR:
            self.cache.clear([segment.slot for segment in header.segments])
            return (CLEAR_SENTINEL,)
        hidden = self.shard.forward(self._inputs(tensor), header.segments, self.cache)
        if not self.shard.is_last:
            return (activation_to_wire(hidden, self.limits.activation_dtype),)
        return self._results(header, hidden)

    def _inputs(self, tensor: Tensor) -> torch.Tensor:
        if not self.shard.is_first:
            return activation_from_wire(tensor, self._compute_dtype)
        token_ids = token_ids_from_wire(tensor)
        vocab_size = self.shard.config.vocab_size
        if token_ids.size and int(token_ids.max()) >= vocab_size:
            raise MessageError(
                f"token id {int(token_ids.max())} is outside the vocabulary of {vocab_size}"
            )
        return torch.from_numpy(token_ids.astype(np.int64))

    def _results(self, header: StepHeader, hidden: torch.Tensor) -> tuple[Tensor, ...]:
        last_rows, wants, end = [], [], 0
        for segment, want in zip(header.segments, header.wants, strict=True):
            end += segment.num_tokens
            if want is not Want.NOTHING:
                last_rows.append(end - 1)
                wants.append(want)
        if not last_rows:
            return (token_ids_to_wire(np.empty(0, dtype="<u4")),)
        rows = hidden if len(last_rows) == hidden.shape[0] else hidden[last_rows]
        logits = self.shard.logits(rows)  # [segments that want something, vocab]
        token_ids = token_ids_to_wire(logits.argmax(dim=-1).cpu().numpy())
        wanted = [row for row, want in enumerate(wants) if want is Want.LOGITS]
        if not wanted:
            return (token_ids,)
        return token_ids, activation_to_wire(logits[wanted].float(), DType.F32)
