"""The codecs there are, by name."""

from collections.abc import Callable, Mapping

from pipeline.stego.codec import StegoCodec
from pipeline.stego.errors import StegoError
from pipeline.stego.range_coding import RangeCodec

CODECS: Mapping[str, Callable[[], StegoCodec]] = {
    "range": RangeCodec,
}


def make_codec(name: str) -> StegoCodec:
    """A codec. Raises StegoError if there is none of that name."""
    if name not in CODECS:
        raise StegoError(f"there is no codec {name[:60]!r}, but {', '.join(CODECS)}")
    return CODECS[name]()
