"""What a codec is: the one place that knows how activations look between two stages.

A codec is a function of each row alone: a request's activations do not depend on its batch-mates.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from pipeline.dtypes import Floats
from transport.tensor_frames import DType, Tensor, TensorSpec


class ActivationCodec(Protocol):
    """Between a stage's [tokens, hidden] and the tensors of a frame."""

    @property
    def name(self) -> str:
        """What manifests and messages call it."""
        ...

    @property
    def hidden_dim(self) -> int:
        """The width of the rows it takes."""
        ...

    @property
    def is_plain_f32(self) -> bool:
        """Whether rows travel as they are computed, so that nothing need be encoded."""
        ...

    def specs(self, num_tokens: int) -> tuple[TensorSpec, ...]:
        """The tensors that activations of so many tokens travel in."""
        ...

    def encode(self, hidden: Floats) -> tuple[Tensor, ...]:
        """Tensors as `specs` says. Raises MessageError for what it cannot carry."""
        ...

    def decode(self, tensors: Sequence[Tensor]) -> Floats:
        """[tokens, hidden], valid as long as the frame is, of tensors as `specs` says.

        Raises MessageError for what no encoder writes.
        """
        ...


@lru_cache(maxsize=256)  # from token to token they are the same
def row_specs(dtype: DType, num_tokens: int, hidden_dim: int) -> tuple[TensorSpec, ...]:
    """The one tensor that rows of a plain number format travel in."""
    return (TensorSpec(dtype, (num_tokens, hidden_dim)),)
