"""Amounts as people write them: 90s, 1h, 500M, 2G."""

import re

from pipeline.errors import InputError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_seconds(text: str, option: str) -> float:
    """A span of time with its unit. Raises InputError naming the flag."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if match is None or not int(match[1]):
        raise InputError(f"{option} {text}: expected a time like 90s, 30m, 1h or 7d")
    return float(int(match[1]) * _SECONDS[match[2]])


def parse_bytes(text: str, option: str) -> int:
    """A size. Raises InputError naming the flag."""
    match = re.fullmatch(r"([0-9]{1,12})([KMGT]?)", text)
    if match is None or not int(match[1]):
        raise InputError(f"{option} {text}: expected a size like 500M or 2G")
    return int(match[1]) * _BYTES[match[2]]
