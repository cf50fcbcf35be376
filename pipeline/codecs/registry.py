"""The codecs there are, by the names that manifests give them."""

from collections.abc import Callable
from functools import cache, partial

from pipeline.codecs.base import ActivationCodec
from pipeline.codecs.plain import Plain
from pipeline.codecs.rotated_int5 import RotatedInt5
from pipeline.codecs.rotated_int8 import RotatedInt8
from transport.tensor_frames import DType

CODECS: dict[str, Callable[[int], ActivationCodec]] = {
    **{dtype.name: partial(Plain, dtype) for dtype in (DType.F32, DType.F16, DType.BF16)},
    RotatedInt8.name: RotatedInt8,
    RotatedInt5.name: RotatedInt5,
}


@cache
def make_codec(name: str, hidden_dim: int) -> ActivationCodec:
    """The codec of that name for rows of that width.

    Raises ValueError where there is none of the name, or none for the width.
    """
    make = CODECS.get(name)
    if make is None:
        raise ValueError(f"no activations travel as {name[:80]!r}; use {', '.join(CODECS)}")
    return make(hidden_dim)
