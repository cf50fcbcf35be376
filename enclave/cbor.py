"""The little of CBOR (RFC 8949) that images and the security module use.

Encoding is deterministic. Decoding is strict: one item of definite length, nothing after it, no
duplicate keys, bounded depth; lengths are checked before anything is stored.
"""

from __future__ import annotations

import struct
from typing import Final

from enclave.errors import CborError

Item = int | bytes | str | bool | None | list["Item"] | dict["Item", "Item"]

MAX_DEPTH: Final = 8  # real documents nest four deep; the limit keeps recursion from running away
_SIMPLE: Final[dict[int, bool | None]] = {0xF4: False, 0xF5: True, 0xF6: None}


def encode(item: Item) -> bytes:
    """Return the shortest encoding of `item`; maps keep their order, as COSE and serde write them.

    Raises: CborError for a type or an integer CBOR has no plain form for.
    """
    if item is None or isinstance(item, bool):
        return bytes([{False: 0xF4, True: 0xF5, None: 0xF6}[item]])
    if isinstance(item, int):
        return _head(0, item) if item >= 0 else _head(1, -1 - item)
    if isinstance(item, bytes):
        return _head(2, len(item)) + item
    if isinstance(item, str):
        text = item.encode()
        return _head(3, len(text)) + text
    if isinstance(item, list):
        return _head(4, len(item)) + b"".join(map(encode, item))
    if isinstance(item, dict):
        pairs = (encode(key) + encode(value) for key, value in item.items())
        return _head(5, len(item)) + b"".join(pairs)
    raise CborError(f"no CBOR for {type(item).__name__}")


def decode(data: bytes) -> Item:
    """Return the one item `data` encodes. Raises: CborError."""
    item, end = _decode_untrusted(data, 0, MAX_DEPTH)
    if end != len(data):
        raise CborError(f"{len(data) - end} bytes after the CBOR item")
    return item


def _head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes([major << 5 | value])
    for code, pack_format in enumerate(("B", ">H", ">I", ">Q"), start=24):
        if value < 1 << 8 * struct.calcsize(pack_format):
            return bytes([major << 5 | code]) + struct.pack(pack_format, value)
    raise CborError(f"integer {value} exceeds 64 bits")


def _read_head_untrusted(data: bytes, at: int) -> tuple[int, int, int]:
    """Return major type, argument and the offset after both."""
    if at >= len(data):
        raise CborError(f"CBOR is cut short at byte {at}")
    major, code = data[at] >> 5, data[at] & 0x1F
    if code < 24:
        return major, code, at + 1
    if code > 27:
        raise CborError(f"indefinite or reserved length at byte {at}")
    size = 1 << (code - 24)
    raw = data[at + 1 : at + 1 + size]
    if len(raw) < size:
        raise CborError(f"CBOR is cut short at byte {at}")
    return major, int.from_bytes(raw, "big"), at + 1 + size


def _decode_untrusted(data: bytes, at: int, depth: int) -> tuple[Item, int]:
    if depth == 0:
        raise CborError(f"CBOR nests deeper than {MAX_DEPTH} at byte {at}")
    major, value, start = _read_head_untrusted(data, at)
    if major < 2:
        return (value if major == 0 else -1 - value), start
    if major < 4:
        return _decode_string_untrusted(data, start, value, is_text=major == 3)
    if major == 7 and data[at] in _SIMPLE:
        return _SIMPLE[data[at]], start
    # Every item takes a byte at least: a huge count is refused before a list of that size exists.
    if major > 5 or value > len(data) - start:
        raise CborError(f"unsupported or overlong CBOR item at byte {at}")
    if major == 4:
        return _decode_array_untrusted(data, start, value, depth - 1)
    return _decode_map_untrusted(data, start, value, depth - 1)


def _decode_string_untrusted(
    data: bytes, start: int, length: int, *, is_text: bool
) -> tuple[Item, int]:
    raw = data[start : start + length]
    if len(raw) < length:
        raise CborError(f"string of {length} bytes is cut short at byte {start}")
    if not is_text:
        return raw, start + length
    try:
        return raw.decode(), start + length
    except UnicodeDecodeError as error:
        raise CborError(f"text at byte {start} is not UTF-8") from error


def _decode_array_untrusted(data: bytes, at: int, count: int, depth: int) -> tuple[list[Item], int]:
    items: list[Item] = []
    for _ in range(count):
        item, at = _decode_untrusted(data, at, depth)
        items.append(item)
    return items, at


def _decode_map_untrusted(
    data: bytes, at: int, count: int, depth: int
) -> tuple[dict[Item, Item], int]:
    pairs: dict[Item, Item] = {}
    for _ in range(count):
        key_at = at
        key, at = _decode_untrusted(data, at, depth)
        if isinstance(key, bool) or not isinstance(key, int | str) or key in pairs:
            raise CborError(f"map key at byte {key_at} is a duplicate, or no number or text")
        pairs[key], at = _decode_untrusted(data, at, depth)
    return pairs, at
