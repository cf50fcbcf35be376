"""What the codecs are called, and their options."""

from collections.abc import Callable, Mapping

from pipeline.stego.codec import StegoCodec
from pipeline.stego.errors import StegoError
from pipeline.stego.fimec import DEFAULT_BLOCK_BITS, FimecCodec
from pipeline.stego.range_coding import RangeCodec

CODECS: Mapping[str, Callable[..., StegoCodec]] = {"fimec": FimecCodec, "range": RangeCodec}
# The options, all of them numbers, and what they are unless said otherwise.
_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "fimec": {"block_bits": DEFAULT_BLOCK_BITS},
    "range": {},
}
_MAX_DIGITS = 9


def parse_codec(text: str) -> StegoCodec:
    """Read `NAME` or `NAME:option=number,...`. Raises StegoError."""
    name, options = _read(text)
    return CODECS[name](**options)


def codec_name(text: str) -> str:
    """The one spelling of what `parse_codec` reads. Raises StegoError."""
    name, options = _read(text)
    CODECS[name](**options)
    spelled = [f"{key}={options[key]}" for key in sorted(options)]
    return f"{name}:{','.join(spelled)}" if spelled else name


def _read(text: str) -> tuple[str, dict[str, int]]:
    """The name, and those options that are not as by default. Raises StegoError."""
    name, _, rest = text.partition(":")
    if name not in CODECS:
        raise StegoError(f"there is no codec {name[:60]!r}, but {', '.join(CODECS)}")
    options: dict[str, int] = {}
    for part in rest.split(",") if rest else []:
        option, _, value = part.partition("=")
        is_known = option in _DEFAULTS[name].keys() - options.keys()
        if not is_known or not value.isdecimal() or len(value) > _MAX_DIGITS:
            known = ", ".join(f"{each}=NUMBER" for each in _DEFAULTS[name]) or "none"
            raise StegoError(f"codec {name}: {part[:60]!r} is not one of its options: {known}")
        options[option] = int(value)
    default = _DEFAULTS[name]
    return name, {key: value for key, value in options.items() if value != default[key]}
