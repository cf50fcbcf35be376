"""How fast this machine is at what stages do: reading weights, and multiplying with them."""

from time import perf_counter

import numpy as np

from pipeline.dtypes import FLOAT32
from pipeline.kernels.base import KernelLinear, Kernels, LinearSpec

# More than caches hold, where there is room: it is read again and again.
_WIDTH = 2048
_LAYER_BYTES = 4 * _WIDTH * _WIDTH
_MOST_BYTES = 128 << 20
_SHARE_OF_MEMORY = 8
# A prompt's rows: enough that arithmetic, and not memory, is the bound.
_ROWS = 64
SECONDS = 1.0


def measure(kernels: Kernels, seconds: float = SECONDS) -> tuple[float, float]:
    """Bytes of weights read a second for one row, and operations a second for many rows."""
    budget = min(_MOST_BYTES, kernels.free_bytes() // _SHARE_OF_MEMORY)
    layers = [_layer(kernels) for _ in range(max(1, budget // _LAYER_BYTES))]
    one = _layers_per_second(kernels, layers, 1, seconds / 2)
    many = _layers_per_second(kernels, layers, _ROWS, seconds / 2)
    return one * _LAYER_BYTES, many * 2 * _WIDTH * _WIDTH * _ROWS


def _layer(kernels: Kernels) -> KernelLinear:
    layer = kernels.linear(LinearSpec(_WIDTH, _WIDTH, bias=False, precision="float32"))
    assert isinstance(layer, KernelLinear)  # all kernels' are
    # Written, since pages that never were all lie in one place, which caches hold.
    weights = np.full((_WIDTH, _WIDTH), 1 / _WIDTH, FLOAT32)
    layer.put(0, weights, None)
    return layer


def _layers_per_second(
    kernels: Kernels, layers: list[KernelLinear], num_rows: int, seconds: float
) -> float:
    rows = kernels.to_device(np.ones((num_rows, _WIDTH), FLOAT32))
    out = kernels.empty(num_rows, _WIDTH)
    layers[0](rows, out)
    began, done = perf_counter(), 0
    while True:
        for layer in layers:
            layer(rows, out)
            done += 1
            kernels.to_host(out)  # a GPU has computed by then
            if (elapsed := perf_counter() - began) > seconds:
                return done / elapsed
