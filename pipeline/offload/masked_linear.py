"""Linears whose rows leave under one-time masks: what assists sees random words, and no more.

(x + r) W - r W = x W in Z_2^64, to the last bit. The mask r is uniform, so x + r is, whatever x
is; how many bits of fraction x has got never leaves. That, and how many rows come when, is all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.dtypes import HostArray
from pipeline.kernels.base import Kernels, Linear, LinearSpec
from pipeline.offload.errors import OtherMasks, WrongProduct
from pipeline.offload.freivalds import ProductCheck
from pipeline.offload.masks import Masks
from pipeline.offload.ring import Words
from pipeline.offload.ring_linear import RingLinear

# Asks for rows times the weights of the linear with that index: [rows, in], out -> [rows, out].
Multiply = Callable[[int, Words, int], Words]


@dataclass(frozen=True, slots=True)
class Assistance:
    """Who multiplies, and what tells whether it did."""

    multiply: Multiply
    check: ProductCheck
    index: int
    name: str

    def product(self, x: Words, num_out: int) -> Words:
        """Rows as they are sent times weights: [rows, in] -> [rows, out]. Raises WrongProduct."""
        y = self.multiply(self.index, x, num_out)
        # Attack: an answer off by what nobody would notice, made up, or given before.
        if y.shape != (len(x), num_out) or not self.check.is_product(x, y):
            raise WrongProduct(self.name)
        return y


class MaskedLinear(RingLinear):
    """A linear without weights: its masks, and somebody to ask."""

    def __init__(
        self, spec: LinearSpec, kernels: Kernels, masks: Masks, assistance: Assistance
    ) -> None:
        super().__init__(assistance.name, spec, kernels)
        self._masks, self._assistance = masks, assistance
        self._shape = masks.header.linears[assistance.index]

    @property
    def reach(self) -> int:
        """As the masks' maker found it."""
        return self._shape.reach

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """The weights are somebody else's to hold."""

    def product(self, x: Words) -> Words:
        """[rows, in] -> [rows, out]. Raises MasksSpent, WrongProduct, and what asking does."""
        hidden = self._masks.draw(self._assistance.index, len(x))
        return self._assistance.product(x + hidden.masks, self.num_out) - hidden.products


class MaskedLinears:
    """Makes a model's linears one by one, as its layers ask for them."""

    def __init__(self, masks: Masks, multiply: Multiply) -> None:
        self._masks, self._multiply = masks, multiply
        self._checks: Sequence[ProductCheck] = masks.checks()
        self._num_made = 0

    def make(self, name: str, spec: LinearSpec, kernels: Kernels) -> Linear:
        """The next linear. Raises OtherMasks."""
        index, shapes = self._num_made, self._masks.header.linears
        expected = (name, spec.num_in, spec.num_out)
        shape = shapes[index] if index < len(shapes) else None
        if shape is None or (shape.name, shape.num_in, shape.num_out) != expected:
            raise OtherMasks(
                f"these masks were made for another model: it has no {name} of "
                f"{spec.num_in} to {spec.num_out} there; make masks for this one"
            )
        self._num_made += 1
        assistance = Assistance(self._multiply, self._checks[index], index, name)
        return MaskedLinear(spec, kernels, self._masks, assistance)
