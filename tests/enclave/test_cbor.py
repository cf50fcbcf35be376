from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave import cbor
from enclave.errors import CborError

# RFC 8949, appendix A.
_VECTORS: list[tuple[str, cbor.Item]] = [
    ("00", 0),
    ("17", 23),
    ("1818", 24),
    ("1903e8", 1000),
    ("1a000f4240", 1000000),
    ("1bffffffffffffffff", (1 << 64) - 1),
    ("3bffffffffffffffff", -(1 << 64)),
    ("20", -1),
    ("3903e7", -1000),
    ("f4", False),
    ("f5", True),
    ("f6", None),
    ("40", b""),
    ("4401020304", b"\1\2\3\4"),
    ("6449455446", "IETF"),
    ("62c3bc", "ü"),
    ("80", []),
    ("8301820203820405", [1, [2, 3], [4, 5]]),
    ("a0", {}),
    ("a201020304", {1: 2, 3: 4}),
    ("a26161016162820203", {"a": 1, "b": [2, 3]}),
]


@pytest.mark.parametrize(("encoded", "item"), _VECTORS)
def test_published_vectors(encoded: str, item: cbor.Item) -> None:
    assert cbor.encode(item).hex() == encoded
    assert cbor.decode(bytes.fromhex(encoded)) == item


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        ("", "cut short"),
        ("0000", "1 bytes after"),
        ("18", "cut short"),
        ("4201", "cut short"),
        ("9f00ff", "indefinite"),
        ("9bffffffffffffffff", "overlong"),
        ("a20101", "cut short"),
        ("a201010102", "duplicate"),
        ("a1f401", "no number or text"),
        ("61ff", "not UTF-8"),
        ("f7", "unsupported"),
        ("fa00000000", "unsupported"),
        ("c000", "unsupported"),
        ("81" * 9 + "00", "nests deeper"),
    ],
)
def test_everything_else_is_refused(encoded: str, reason: str) -> None:
    with pytest.raises(CborError, match=reason):
        cbor.decode(bytes.fromhex(encoded))


@pytest.mark.parametrize("item", [1 << 64, -(1 << 64) - 1])
def test_integer_over_64_bits_is_refused(item: int) -> None:
    with pytest.raises(CborError, match="64 bits"):
        cbor.encode(item)


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_raise_cbor_error(data: bytes) -> None:
    try:
        item = cbor.decode(data)
    except CborError:
        return
    assert cbor.decode(cbor.encode(item)) == item
