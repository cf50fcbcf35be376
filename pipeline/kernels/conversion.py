"""What converts weights that stay a host's arrays: in C where that works here, else in numpy."""

from collections.abc import Callable
from typing import NamedTuple

from pipeline.dtypes import HostArray
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.weights.int4 import Int4, quantise_int4
from pipeline.weights.quantization import quantise
from pipeline.weights.tensor_sinks import Fill, fill_array


class Conversion(NamedTuple):
    """The same to the bit, whatever does it."""

    # Sets an array to rows of its shape, of floats that are to become such as it has.
    fill: Fill
    # Sets values [out, in] and scales to those of weights [out, in].
    quantise: Callable[[HostArray, HostArray, HostArray], None]
    # The same in four bits.
    quantise_int4: Callable[[HostArray], Int4]


def choose_conversion() -> Conversion:
    """The fastest there is here."""
    if why_not_native() is not None:
        return Conversion(fill_array, _quantise, quantise_int4)
    from pipeline.kernels import native_conversion  # noqa: PLC0415 (may be absent)

    return Conversion(
        native_conversion.fill, native_conversion.quantise_into, native_conversion.quantise_int4
    )


def _quantise(outputs: HostArray, values: HostArray, scales: HostArray) -> None:
    values[...], scales[...] = quantise(outputs)
