"""What the codecs are called, and their options."""

from collections.abc import Callable, Mapping

from pipeline.stego.codec import StegoCodec
from pipeline.stego.errors import StegoError
from pipeline.stego.fimec import FimecCodec
from pipeline.stego.range_coding import RangeCodec

CODECS: Mapping[str, Callable[..., StegoCodec]] = {"fimec": FimecCodec, "range": RangeCodec}
_OPTIONS: Mapping[str, frozenset[str]] = {"fimec": frozenset({"block_bits"}), "range": frozenset()}


def parse_codec(text: str) -> StegoCodec:
    """Read `NAME` or `NAME:option=number,...`. Raises StegoError."""
    name, _, rest = text.partition(":")
    if name not in CODECS:
        raise StegoError(f"there is no codec {name[:60]!r}, but {', '.join(CODECS)}")
    options: dict[str, int] = {}
    for part in rest.split(",") if rest else []:
        option, _, value = part.partition("=")
        if option not in _OPTIONS[name] - options.keys() or not value.isdecimal():
            known = ", ".join(f"{each}=NUMBER" for each in _OPTIONS[name]) or "none"
            raise StegoError(f"codec {name}: {part[:60]!r} is not one of its options: {known}")
        options[option] = int(value)
    return CODECS[name](**options)
