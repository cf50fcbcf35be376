"""What the codecs are called."""

from collections.abc import Callable, Mapping

from pipeline.stego.codec import StegoCodec
from pipeline.stego.errors import StegoError
from pipeline.stego.range_coding import RangeCodec

CODECS: Mapping[str, Callable[..., StegoCodec]] = {"range": RangeCodec}


def parse_codec(text: str) -> StegoCodec:
    """Read `NAME`. Raises StegoError."""
    if text not in CODECS:
        raise StegoError(f"there is no codec {text[:60]!r}, but {', '.join(CODECS)}")
    return CODECS[text]()
