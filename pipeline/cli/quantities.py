"""Amounts as people write them: 90s, 1h, 500M, 2G."""

import re
from typing import Annotated

from pydantic import PlainValidator

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _seconds(text: object) -> float:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", str(text))
    if match is None or not int(match[1]):
        raise ValueError("give a time like 90s, 30m, 1h or 7d")
    return float(int(match[1]) * _SECONDS[match[2]])


def _num_bytes(text: object) -> int:
    match = re.fullmatch(r"([0-9]{1,12})([KMGT]?)", str(text))
    if match is None or not int(match[1]):
        raise ValueError("give a size like 500M or 2G")
    return int(match[1]) * _BYTES[match[2]]


# A span of time with its unit, in seconds; a size, in bytes.
Seconds = Annotated[float, PlainValidator(_seconds)]
Bytes = Annotated[int, PlainValidator(_num_bytes)]
