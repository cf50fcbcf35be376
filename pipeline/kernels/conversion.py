"""What converts weights that stay a host's arrays: in C where that works here, else in numpy."""

from collections.abc import Callable
from typing import NamedTuple

from pipeline.dtypes import HostArray
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.weights.quantization import quantise
from pipeline.weights.tensor_sinks import Fill, fill_array


class Conversion(NamedTuple):
    """The same to the bit, whatever does it."""

    # Sets an array to rows of its shape, of floats that are to become such as it has.
    fill: Fill
    # Sets values [out, in] and scales to those of weights [out, in].
    quantise: Callable[[HostArray, HostArray, HostArray], None]


def choose_conversion() -> Conversion:
    """The fastest there is here."""
    if why_not_native() is not None:
        return Conversion(fill_array, _quantise)
    from pipeline.kernels import native_kernels  # noqa: PLC0415 (may be absent)

    return Conversion(native_kernels.fill, native_kernels.quantise_into)


def _quantise(outputs: HostArray, values: HostArray, scales: HostArray) -> None:
    values[...], scales[...] = quantise(outputs)
