"""What a request says, held against what this door takes, before anything of it is stored."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.codecs.base import ActivationCodec
from pipeline.doors.bodies import (
    MAX_MARK_BYTES,
    TAG_BYTES,
    Frame,
    Place,
    parse_place,
    request_digest,
)
from pipeline.doors.messages import DoorError, DoorFault, InferRequest, Payload
from pipeline.errors import MessageError
from transport.tensor_frames import Tensor, TensorSpec

_SESSION_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Question:
    """A request whose fields can be meant; its body is still sealed, and may be anybody's."""

    frame: Frame
    place: Place
    num_tokens: int
    specs: tuple[TensorSpec, ...]
    sealed: Payload
    digest: bytes

    @property
    def is_first(self) -> bool:
        """Whether a session may begin with it, at another position than 0 from what is stored."""
        return self.place.step == 0 and self.num_tokens > 0

    @property
    def is_last(self) -> bool:
        """Whether it takes back all there is: the session ends."""
        return self.place.position == 0 and self.num_tokens == 0

    def tensors(self, plain: bytes) -> tuple[tuple[Tensor, ...], bytes]:
        """The rows of its opened body as they travel, and the mark behind them."""
        view = memoryview(plain)
        tensors, at = [], 0
        for spec in self.specs:
            tensors.append(Tensor(spec, view[at : at + spec.nbytes]))
            at += spec.nbytes
        return tuple(tensors), bytes(view[at:])


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request is held against."""

    codec: ActivationCodec
    max_seq_len: int
    max_step_tokens: int

    def check(self, request: InferRequest) -> Question:
        """Refuse names, shapes, places and sizes there is no room for. Raises DoorError."""
        if not _SESSION_ID.fullmatch(request.session_id):
            raise _invalid("session_id is not 1 to 128 of A-Z a-z 0-9 _ . : -")
        if request.max_new_tokens not in {0, 1} or request.temperature != 0:
            raise _invalid(
                f"max_new_tokens {request.max_new_tokens} at temperature {request.temperature:g}: "
                "this door draws no tokens; the head is the client's"
            )
        if request.dtype != self.codec.name:
            raise _invalid(f"dtype is {request.dtype[:40]!r}, expected {self.codec.name!r}")
        try:
            place = parse_place(request.nonce)
        except MessageError as error:
            raise _invalid(str(error)) from error
        num_tokens = self._num_tokens(request.shape)
        self._check_place(place, num_tokens)
        specs = self.codec.specs(num_tokens) if num_tokens else ()
        sealed = request.cloaked_embedding
        least = sum(spec.nbytes for spec in specs) + TAG_BYTES
        if not least <= len(sealed) <= least + MAX_MARK_BYTES:
            raise _invalid(
                f"cloaked_embedding has {len(sealed)} bytes, "
                f"{num_tokens} tokens as {self.codec.name} take {least}"
            )
        frame = Frame(request.session_id, request.dtype, tuple(request.shape))
        return Question(
            frame, place, num_tokens, specs, sealed, request_digest(frame, place, sealed)
        )

    def _num_tokens(self, shape: Sequence[int]) -> int:
        width = self.codec.hidden_dim
        if len(shape) != 2 or any(type(size) is not int for size in shape) or shape[1] != width:
            raise _invalid(f"shape is {_shown(shape)}, expected [tokens, {width}]")
        if shape[0] < 0:
            raise _invalid(f"shape is {_shown(shape)}: no number of tokens")
        if shape[0] > self.max_step_tokens:
            detail = f"a step of {_shown(shape[:1])} tokens, the most is {self.max_step_tokens}"
            raise DoorError(DoorFault.TOO_LARGE, detail)
        return shape[0]

    def _check_place(self, place: Place, num_tokens: int) -> None:
        end = place.position + num_tokens
        if end > self.max_seq_len:
            detail = f"the step reaches position {end}, the context is {self.max_seq_len}"
            raise DoorError(DoorFault.TOO_LARGE, detail)
        if place.num_rows > num_tokens:
            raise _invalid(f"{place.num_rows} rows are wanted of a step of {num_tokens} tokens")


def _shown(shape: Sequence[object]) -> str:
    """A few of a stranger's numbers, each of a bounded length."""
    return f"[{', '.join(str(size)[:20] for size in shape[:4])}]"


def _invalid(detail: str) -> DoorError:
    return DoorError(DoorFault.INVALID, detail)
