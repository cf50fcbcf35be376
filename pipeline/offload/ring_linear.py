"""A model's linears computed in Z_2^64, wherever: floats come in and floats leave."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from pipeline.dtypes import Array, HostArray, Precision
from pipeline.kernels.base import Kernels, Linear, LinearSpec
from pipeline.kernels.huge_pages import Arena
from pipeline.models.layer_parts import LayerParts
from pipeline.offload.fixed_point import Reach, from_ring, to_ring, weights_to_ring
from pipeline.offload.ring import RingMatrix, Words
from pipeline.weights.tensor_sinks import Sink, linear_sinks

# What stays where the model's ends are: the head, which may be the embedding too.
HEAD = "lm_head"


class RingLinear(ABC):
    """activation(x W^T + b) + residual, with the product in Z_2^64."""

    precision: Precision = "float32"

    def __init__(self, name: str, spec: LinearSpec, kernels: Kernels) -> None:
        self.name, self.num_in, self.num_out = name, spec.num_in, spec.num_out
        self._activation = spec.activation
        self._bias = np.empty(spec.num_out, np.float32) if spec.bias else None
        self._kernels = kernels

    @property
    @abstractmethod
    def reach(self) -> int:
        """The greatest sum of the magnitudes of one output's weights, in fixed point."""

    @abstractmethod
    def product(self, x: Words) -> Words:
        """[rows, in] -> [rows, out], exactly."""

    @abstractmethod
    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Take weights of outputs first.., of their inputs those from `first_in` on."""

    def __call__(self, x: Array, out: Array, residual: Array | None = None) -> Array:
        """[rows, in] -> out [rows, out]."""
        (rows,) = self._kernels.to_host(x)
        words, scales = to_ring(rows, self.reach)
        return self._finish(from_ring(self.product(words), scales), out, residual)

    def _finish(self, y: HostArray, out: Array, residual: Array | None) -> Array:
        if self._bias is not None:
            y += self._bias
        found = y.astype(np.float32)
        if self._activation != "none":
            from pipeline.kernels.torch_kernels import ACTIVATIONS, to_tensor  # noqa: PLC0415

            found = ACTIVATIONS[self._activation](to_tensor(found)).numpy()
        if residual is not None:
            (added,) = self._kernels.to_host(residual)
            found += added
        self._kernels.fill(out, found)
        return out

    def gather(self, ids: Array, out: Array) -> None:
        """Only an embedding is asked for its rows. Raises AssertionError."""
        del ids, out
        raise AssertionError("the head stays with the embedding")

    def sinks(
        self, name: str, first: int = 0, last: int | None = None, *, is_in_out: bool = False
    ) -> dict[str, Sink]:
        """Sinks of checkpoint layer `name`, which gives outputs first..last of this one."""
        outputs = range(first, self.num_out if last is None else last)
        return linear_sinks(name, self, outputs, self.num_in, self._bias, is_in_out=is_in_out)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return 0 if self._bias is None else self._bias.nbytes


class WeighedLinear(RingLinear):
    """One that its weights come to."""

    def __init__(self, name: str, spec: LinearSpec, kernels: Kernels) -> None:
        super().__init__(name, spec, kernels)
        self._reach = Reach(spec.num_out)

    @property
    def reach(self) -> int:
        """Of the weights that have come."""
        return self._reach.value

    def _hold(self, matrix: RingMatrix, first: int, outputs: HostArray, first_in: int) -> None:
        """In fixed point. Raises ModelError for those that do not fit."""
        fixed = weights_to_ring(outputs)
        matrix.put(first, fixed, first_in=first_in)
        self._reach.add(first, fixed)


class HeldLinear(WeighedLinear):
    """One whose weights are here: what an assistant holds, and what masks are made from."""

    def __init__(self, name: str, spec: LinearSpec, kernels: Kernels, arena: Arena) -> None:
        super().__init__(name, spec, kernels)
        self.matrix = RingMatrix(spec.num_in, spec.num_out, arena=arena)

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Hold them in fixed point. Raises ModelError for those that do not fit."""
        del scales
        self._hold(self.matrix, first, outputs, first_in)

    def product(self, x: Words) -> Words:
        """[rows, in] -> [rows, out]."""
        return self.matrix(x)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return super().num_bytes + self.matrix.num_bytes


class HeldParts(LayerParts):
    """Makes linears that hold their weights in fixed point; all but the head."""

    are_recordable: ClassVar[bool] = False
    are_watched: ClassVar[bool] = True

    def __init__(self) -> None:
        self.linears: list[HeldLinear] = []
        self._arena = Arena()

    def linear(self, name: str, spec: LinearSpec, kernels: Kernels) -> Linear:
        """The linear `name`, in Z_2^64 unless it is the head."""
        if name == HEAD:
            return kernels.linear(spec)
        made = HeldLinear(name, spec, kernels, self._arena)
        self.linears.append(made)
        return made
