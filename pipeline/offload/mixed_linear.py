"""Linears of which a prompt's rows leave mixed, and the few rows of later steps not at all."""

from dataclasses import replace

import numpy as np

from pipeline.dtypes import Array, HostArray
from pipeline.kernels.base import KernelLinear, Kernels, LinearSpec
from pipeline.offload.fixed_point import from_ring, to_ring
from pipeline.offload.freivalds import ProductCheck, SecretVectors, project_weight
from pipeline.offload.masked_linear import Assistance, Multiply
from pipeline.offload.mixing import MIN_ROWS, Mixture
from pipeline.offload.ring import RingMatrix, Words
from pipeline.offload.ring_linear import WeighedLinear
from pipeline.weights.tensor_sinks import in_precision


class MixedLinear(WeighedLinear):
    """A linear with its weights here, that has somebody multiply whatever can be mixed."""

    def __init__(
        self,
        name: str,
        spec: LinearSpec,
        kernels: Kernels,
        vectors: SecretVectors,
        multiply: Multiply,
        index: int,
    ) -> None:
        super().__init__(name, spec, kernels)
        bare = replace(spec, bias=False, activation="none")
        own = kernels.linear(bare)
        assert isinstance(own, KernelLinear), "kernels make linears of their own"
        self._own = own
        self._vectors, self._multiply, self._index = vectors, multiply, index
        # Weights until all are there to be projected.
        self._gathered: RingMatrix | None = RingMatrix(spec.num_in, spec.num_out)
        self._num_gathered = 0
        self._assistance: Assistance | None = None

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Hold them as the kernels do. Raises ModelError for those without room in the ring."""
        del scales
        for at, piece, own_scales in in_precision(self._own.precision, first, outputs, None):
            self._own.put(at, piece, own_scales, first_in=first_in)
        assert self._gathered is not None, "each output comes once"
        self._hold(self._gathered, first, outputs, first_in)
        self._num_gathered += outputs.size
        if self._num_gathered == self.num_out * self.num_in:
            projected = project_weight(self._vectors, self._gathered.transposed())
            check = ProductCheck(self._vectors, projected)
            self._assistance = Assistance(self._multiply, check, self._index, self.name)
            self._gathered = None

    def __call__(self, x: Array, out: Array, residual: Array | None = None) -> Array:
        """[rows, in] -> out [rows, out]. Raises WrongProduct, and what asking does."""
        (rows,) = self._kernels.to_host(x)
        if len(rows) < MIN_ROWS:
            own = self._kernels.empty(len(rows), self.num_out)
            (found,) = self._kernels.to_host(self._own(x, own))
            return self._finish(found, out, residual)
        is_sound = np.isfinite(rows).all(axis=1, keepdims=True)
        mixture = Mixture(len(rows))
        mixed = mixture.mix(np.where(is_sound, rows, 0).astype(np.float64))
        words, scales = to_ring(mixed, self.reach)
        found = mixture.unmix(from_ring(self.product(words), scales))
        return self._finish(np.where(is_sound, found, np.nan), out, residual)

    def product(self, x: Words) -> Words:
        """[rows, in] -> [rows, out], mixed as they are."""
        assert self._assistance is not None, "all weights have come"
        return self._assistance.product(x, self.num_out)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return super().num_bytes + self._own.num_bytes
