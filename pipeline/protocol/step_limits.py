"""What a step may be: the limits of a session, and the tensors that go with a header."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.codecs.base import ActivationCodec
from pipeline.errors import MessageError
from pipeline.protocol.last_stage_inputs import (
    NOTHING_ASKED,
    Asked,
    asked_specs,
    asked_to_wire,
    max_draw_bytes,
)
from pipeline.protocol.result_kinds import Result, Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.tide_window import TideWindow
from transport.frozen import frozen
from transport.tensor_frames import DType, Tensor, TensorSpec

TokenIds = npt.NDArray[np.uint32]
CLEAR_SPEC = TensorSpec(DType.U32, (0,))
CLEAR_SENTINEL = Tensor(CLEAR_SPEC, memoryview(b""))
_GOES_WITH = frozenset({Result.LOGPROBS, Result.DRAWN})
# What stages can answer that have no head.
_WITHOUT_HEAD = frozenset({Result.NOTHING, Result.HIDDEN})
# Rows for which all of a vocabulary travels, as logits or as a mask, for each slot of a session.
WHOLE_ROWS = 32
# Log-probabilities that one step may ask for: a few megabytes.
MAX_LOGPROBS = 1 << 20


@frozen
class SessionLimits:
    """What a session agreed on; every step is held against it before its tensor is stored."""

    num_slots: int
    max_seq_len: int
    max_step_tokens: int
    # How activations travel, and how wide they are.
    codec: ActivationCodec
    # Whether embedding and head are the orchestrator's: stages take rows and return rows, and are
    # told no token, neither as an id nor by what is asked of the last one.
    has_client_ends: bool = False
    # What a slot keeps of a text of up to `max_seq_len` tokens; None: all of it.
    window: TideWindow | None = None

    @property
    def max_rows(self) -> int:
        """Positions that a slot has memory for."""
        return self.max_seq_len if self.window is None else self.window.size

    @property
    def max_row_bytes(self) -> int:
        """Most bytes that a step's rows may take between stages."""
        activations = sum(spec.nbytes for spec in self.codec.specs(self.max_step_tokens))
        return max(activations, self.max_step_tokens * DType.U32.itemsize)

    @property
    def max_tensor_bytes(self) -> int:
        """Most bytes of tensors a step may carry between stages, what is asked of the last one too.

        A bound for any step; each is held against its own header before anything is stored.
        """
        if self.has_client_ends:
            return self.max_row_bytes
        given = MAX_LOGPROBS * DType.U32.itemsize
        draws = max_draw_bytes(self.num_slots, self.max_whole_rows, self.max_seq_len)
        return self.max_row_bytes + given + draws

    @property
    def max_whole_rows(self) -> int:
        """Most rows of a step that may want logits, or be drawn."""
        return self.num_slots * WHOLE_ROWS


def told(specs: tuple[TensorSpec, ...]) -> str:
    """What a step carries, as refusals name it."""
    return " and ".join(map(str, specs)) or "nothing"


@lru_cache(maxsize=256)
def token_specs(num_tokens: int) -> tuple[TensorSpec, ...]:
    """The tensor that as many token ids travel in."""
    return (TensorSpec(DType.U32, (num_tokens,)),)


def check_header(header: StepHeader, limits: SessionLimits) -> None:
    """Refuse a step of slots, positions or sizes there is no room for. Raises MessageError."""
    kind, step, segments, wants, _, _ = header
    if kind is StepKind.COPY:
        _check_copies(header, limits)
        return
    if not segments:
        raise MessageError(f"step {step} has no segments")
    if len({slot for slot, _, _ in segments}) != len(segments):
        raise MessageError(f"step {step} names a slot twice")
    takes_back = kind is StepKind.TRUNCATE
    total = 0
    for slot, position, num_tokens in segments:
        if slot >= limits.num_slots:
            raise MessageError(f"step {step} names slot {slot}, there are {limits.num_slots}")
        end = position + num_tokens
        if end > limits.max_seq_len:
            raise MessageError(
                f"step {step} reaches position {end}, the context is {limits.max_seq_len}"
            )
        if (num_tokens == 0) is not takes_back:
            raise MessageError(f"step {step} has a segment of {num_tokens} tokens")
        total += num_tokens
    if total > limits.max_step_tokens:
        raise MessageError(f"step {step} has {total} tokens, the limit is {limits.max_step_tokens}")
    has_own_wants = kind is not StepKind.STEP or wants.count(Want.TOKEN) != len(wants)
    if has_own_wants or limits.has_client_ends:  # else as most are
        _check_wants(header, limits)


def _check_copies(header: StepHeader, limits: SessionLimits) -> None:
    step, segments = header.step, header.segments
    if not segments or len(segments) % 2 or any(header.wants):
        raise MessageError(f"step {step} copies {len(segments)} segments, or wants a result")
    targets = {target.slot for target in segments[1::2]}
    for source, target in zip(segments[::2], segments[1::2], strict=True):
        if max(source.slot, target.slot) >= limits.num_slots or source.slot == target.slot:
            raise MessageError(
                f"step {step} copies slot {source.slot} to {target.slot} of {limits.num_slots}"
            )
        is_same = source.num_tokens == target.num_tokens and not source.position | target.position
        if not is_same or not 0 < source.num_tokens <= limits.max_seq_len:
            raise MessageError(
                f"step {step} copies {source.num_tokens} tokens at position {source.position} as "
                f"{target.num_tokens} at {target.position}, the context is {limits.max_seq_len}"
            )
    if len(targets) != len(segments) // 2:
        raise MessageError(f"step {step} copies to a slot twice")


def _check_wants(header: StepHeader, limits: SessionLimits) -> None:
    step, is_replay = header.step, header.kind is StepKind.REPLAY
    num_whole = num_logprobs = 0
    for segment, want in zip(header.segments, header.wants, strict=True):
        result, rows, _, _ = want
        if is_replay and result is not Result.NOTHING:
            raise MessageError(f"replayed step {step} wants a result")
        if limits.has_client_ends and result not in _WITHOUT_HEAD:
            raise MessageError(
                f"step {step} wants {result.name}: the split is client, so rows alone come back"
            )
        if rows > segment.num_tokens:
            raise MessageError(
                f"step {step} wants {rows} rows of a segment of {segment.num_tokens}"
            )
        num_logprobs += want.num_logprobs
        if result in {Result.LOGITS, Result.DRAWN}:
            num_whole += rows
    if num_whole > limits.max_whole_rows or num_logprobs > MAX_LOGPROBS:
        raise MessageError(
            f"step {step} wants {num_whole} rows of logits and {num_logprobs} log-probabilities, "
            f"the limits are {limits.max_whole_rows} and {MAX_LOGPROBS}"
        )


def expected_inputs(
    header: StepHeader,
    limits: SessionLimits,
    *,
    is_first: bool,
    declared: Sequence[TensorSpec] = (),
) -> tuple[TensorSpec, ...]:
    """The tensors a stage takes with this header; of those `declared`, draws have many sizes."""
    if not header.carries_tokens:
        return (CLEAR_SPEC,)
    num_tokens = header.num_tokens
    takes_ids = is_first and not limits.has_client_ends
    rows = token_specs(num_tokens) if takes_ids else limits.codec.specs(num_tokens)
    if any(map(_GOES_WITH.__contains__, [want.result for want in header.wants])):
        return (*rows, *asked_specs(header.wants, declared, limits.max_seq_len))
    return rows


def num_row_tensors(limits: SessionLimits, *, is_first: bool) -> int:
    """How many of a step's tensors are its rows; what is behind them is for the last stage."""
    return 1 if is_first else len(limits.codec.specs(1))


def step_tensors(
    header: StepHeader, token_ids: Sequence[int], asked: Asked = NOTHING_ASKED
) -> tuple[Tensor, ...]:
    """What goes to the first stage with a header."""
    if not header.carries_tokens:
        return (CLEAR_SENTINEL,)
    return (token_ids_to_wire(token_ids), *asked_to_wire(asked))


def token_ids_to_wire(token_ids: Sequence[int] | TokenIds) -> Tensor:
    """Token ids as a U32 tensor of their number."""
    array = np.ascontiguousarray(token_ids, dtype="<u4")
    return Tensor(token_specs(array.size)[0], array.data.cast("B"))


def token_ids_from_wire(tensor: Tensor) -> TokenIds:
    """A U32 tensor's token ids. Raises MessageError for another dtype or rank."""
    if tensor.spec.dtype is not DType.U32 or len(tensor.spec.shape) != 1:
        raise MessageError(f"token ids arrived as {tensor.spec.dtype.name}{tensor.spec.shape}")
    return np.frombuffer(tensor.data, dtype="<u4")
