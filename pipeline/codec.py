"""How activations look between two stages: plain in a dtype, or int8 after a rotation.

A codec is a function of each row alone: a request's activations do not depend on its batch-mates.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pipeline.dtypes import Floats
from pipeline.errors import MessageError
from pipeline.rotation import Rotation
from pipeline.steps import SessionLimits, activation_specs
from pipeline.tensors import activation_from_wire, activation_to_wire
from transport.frames import DType, Tensor

# Symmetric: -128 is never sent, so that a row and its negative lose the same.
INT8_MAX = 127
# Of a row of zeros.
MIN_SCALE = float(np.finfo(np.float32).tiny)
# Beyond any activation, and small enough that no sum over a row overflows float32.
MAX_SCALE = 2.0**90


def check_scales(scales: Floats) -> None:
    """Refuse rows that are not finite, or absurd. Raises MessageError."""
    # Both comparisons are false for a NaN, which a reduction passes on.
    if not (np.minimum.reduce(scales) >= MIN_SCALE and np.maximum.reduce(scales) <= MAX_SCALE):
        raise MessageError("a row of activations has a scale that is not a positive finite number")


class ActivationCodec(Protocol):
    """Between a stage's [tokens, hidden] and the tensors of a frame."""

    def encode(self, hidden: Floats) -> tuple[Tensor, ...]:
        """Tensors as `activation_specs` says. Raises MessageError for what it cannot carry."""
        ...

    def decode(self, tensors: Sequence[Tensor]) -> Floats:
        """[tokens, hidden], valid as long as the frame is. Raises MessageError."""
        ...


def activation_codec(limits: SessionLimits) -> ActivationCodec:
    """The codec a session agreed on."""
    if limits.activation_dtype is DType.I8:
        return RotatedInt8(limits.hidden_dim)
    return Plain(limits.activation_dtype)


class Plain:
    """One tensor of the wire's dtype."""

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype

    def encode(self, hidden: Floats) -> tuple[Tensor, ...]:
        """View [tokens, hidden] as bytes, converted if need be."""
        return (activation_to_wire(hidden, self._dtype),)

    def decode(self, tensors: Sequence[Tensor]) -> Floats:
        """View the bytes as [tokens, hidden], converted if need be."""
        return activation_from_wire(tensors[0])


class RotatedInt8:
    """Each row rotated, then quantised symmetrically: I8 [tokens, hidden], F32 scales [tokens].

    Why a scale for the whole row is enough: after the rotation its elements are of a size.
    """

    def __init__(self, hidden_dim: int) -> None:
        self._rotation = Rotation(hidden_dim)

    def encode(self, hidden: Floats) -> tuple[Tensor, ...]:
        """Rotate and quantise [tokens, hidden]. Raises MessageError unless all are finite."""
        with np.errstate(over="ignore", invalid="ignore"):  # the scale shows both
            rotated = self._rotation.apply(hidden)
        scales = np.maximum.reduce(np.abs(rotated), axis=-1)
        scales /= INT8_MAX
        np.maximum(scales, MIN_SCALE, out=scales)
        check_scales(scales)
        rotated /= scales[:, None]
        quantised = np.rint(rotated, out=rotated).astype(np.int8)
        specs = activation_specs(DType.I8, len(hidden), hidden.shape[1])
        return (
            Tensor(specs[0], quantised.data.cast("B")),
            Tensor(specs[1], scales.data.cast("B")),
        )

    def decode(self, tensors: Sequence[Tensor]) -> Floats:
        """Undo both. Raises MessageError for a scale that no encoder writes."""
        quantised, scales = (
            np.frombuffer(tensor.data, kind).reshape(tensor.spec.shape)
            for tensor, kind in zip(tensors, ("<i1", "<f4"), strict=True)
        )
        check_scales(scales)
        rotated = quantised.astype(np.float32)
        rotated *= scales[:, None]
        return self._rotation.undo(rotated)
