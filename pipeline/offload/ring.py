"""Products in Z_2^64: whatever wraps around wraps the same everywhere, so they are exact."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.kernels.huge_pages import Arena
from pipeline.kernels.kernel_selection import why_not_native

Words = npt.NDArray[np.uint64]

LANES = 8  # outputs side by side, as the kernel takes them


class RingMatrix:
    """A matrix [in, out] over Z_2^64 that rows are multiplied by, empty at first.

    Held in 32 bits, with a sign, unless it is wide.
    """

    def __init__(
        self, num_in: int, num_out: int, *, is_wide: bool = False, arena: Arena | None = None
    ) -> None:
        self.num_in, self.num_out = num_in, num_out
        dtype = np.dtype(np.int64 if is_wide else np.int32)
        shape = (-(-num_out // LANES), num_in, LANES)
        memory = (arena or Arena()).take(int(np.prod(shape)) * dtype.itemsize)
        self._packed: npt.NDArray[Any] = memory.view(dtype).reshape(shape)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self._packed.nbytes

    def put(self, first: int, outputs: npt.NDArray[Any], *, first_in: int = 0) -> None:
        """Set outputs first.., of their inputs those from `first_in` on: integers that fit."""
        width = outputs.shape[1]
        packed = self._packed[:, first_in : first_in + width]
        begin = min(-first % LANES, len(outputs))
        end = begin + (len(outputs) - begin) // LANES * LANES
        whole = outputs[begin:end].reshape(-1, LANES, width)
        block = (first + begin) // LANES
        packed[block : block + len(whole)] = whole.transpose(0, 2, 1)
        for at in (*range(begin), *range(end, len(outputs))):
            packed[(first + at) // LANES, :, (first + at) % LANES] = outputs[at]

    def transposed(self) -> npt.NDArray[Any]:
        """All of it as [in, out]."""
        wide = self._packed.transpose(1, 0, 2).reshape(self.num_in, -1)
        return wide[:, : self.num_out]

    def __call__(self, x: Words) -> Words:
        """[rows, in] -> [rows, out]."""
        assert x.dtype == np.uint64, "numbers of the ring"
        assert x.shape[1] == self.num_in, "rows of this matrix"
        if why_not_native() is not None:
            return self._product(x)
        from pipeline.kernels import _native  # noqa: PLC0415 (may be absent)

        x = np.ascontiguousarray(x)
        y = np.empty((len(x), self.num_out), np.uint64)
        size = self._packed.itemsize
        _native.ring_product(size, self._packed, x, y, len(x), self.num_in, self.num_out)
        return y

    def _product(self, x: Words) -> Words:
        """The same without a kernel; numpy's integers wrap around."""
        y = np.empty((len(x), len(self._packed), LANES), np.int64)
        for block, lanes in enumerate(self._packed):
            y[:, block] = x.view(np.int64) @ lanes.astype(np.int64, copy=False)
        wide = y.reshape(len(x), len(self._packed) * LANES)
        return np.ascontiguousarray(wide[:, : self.num_out]).view(np.uint64)
