import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transport.attestation import cbor
from transport.errors import AttestationError, MisuseError, ProtocolError

_LEAVES = st.integers(-(2**64), 2**64 - 1) | st.binary() | st.text() | st.booleans() | st.none()


def _containers(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(
        st.integers(0, 99) | st.text(), inner, max_size=4
    )


_VALUES = _LEAVES | _containers(_LEAVES | _containers(_LEAVES | _containers(_LEAVES)))


@given(_VALUES)
def test_what_is_encoded_decodes_to_itself(value):
    encoded = cbor.encode(value)
    assert cbor.decode(encoded) == value


@given(st.binary(max_size=300))
@example(b"\x9f" * 40)
@example(b"\x5b" + b"\xff" * 8)
@example(b"\xbf\x01")
@example(b"\x62\xff\xff")
def test_arbitrary_bytes_raise_nothing_but_protocol_errors(data):
    with contextlib.suppress(ProtocolError):
        cbor.decode(data)


@given(_VALUES, st.data())
def test_mutated_encodings_raise_nothing_but_protocol_errors(value, data):
    mutated = bytearray(cbor.encode(value))
    position = data.draw(st.integers(0, len(mutated) - 1))
    mutated[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        cbor.decode(bytes(mutated))


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ("00", 0),
        ("1818", 24),
        ("1800", 0),  # not the shortest form, but not ambiguous
        ("1bffffffffffffffff", 2**64 - 1),
        ("3bffffffffffffffff", -(2**64)),
        ("f4", False),
        ("f5", True),
        ("f6", None),
        ("40", b""),
        ("5f42010243030405ff", bytes([1, 2, 3, 4, 5])),
        ("7f657374726561646d696e67ff", "streaming"),
        ("9f01820203ff", [1, [2, 3]]),
        ("bf61610161629f0203ffff", {"a": 1, "b": [2, 3]}),
        ("5fff", b""),
        ("9fff", []),
        ("bfff", {}),
    ],
)
def test_definite_and_indefinite_items_are_read(data, value):
    decoded = cbor.decode(bytes.fromhex(data))
    assert decoded == value
    assert type(decoded) is type(value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "missing"),
        ("0000", "after the end"),
        ("a201000100", "duplicate"),
        ("bf01000100ff", "duplicate"),
        ("a20100180100", "duplicate"),  # the same key in two forms
        ("a1f500", "map key"),
        ("a14000", "map key"),
        ("a1f600", "map key"),
        ("c000", "major type 6"),
        ("d28440a04040", "major type 6"),
        ("f7", "major type 7"),
        ("f97e00", "not allowed"),
        ("fb7ff0000000000000", "not allowed"),
        ("f814", "not allowed"),
        ("ff", "not allowed"),
        ("1c", "not allowed"),
        ("1f", "not allowed"),
        ("3f", "not allowed"),
        ("5f01ff", "chunks"),
        ("5f6161ff", "chunks"),
        ("5f5f4101ffff", "chunks"),
        ("5f4101", "missing"),
        ("9f01", "missing"),
        ("bf01ff", "not allowed"),
        ("5bffffffffffffffff", "missing"),
        ("9bffffffffffffffff", "missing"),
        ("61ff", "UTF-8"),
    ],
)
def test_ambiguous_or_unknown_items_are_refused(data, reason):
    with pytest.raises(AttestationError, match=reason) as caught:
        cbor.decode(bytes.fromhex(data))
    assert caught.value.check == "cbor"


def test_depth_items_and_size_are_bounded():
    allowed = b"\x81" * cbor.MAX_DEPTH + b"\x00"
    assert cbor.decode(allowed)
    for data in (
        b"\x81" + allowed,
        b"\x9b" + (2000).to_bytes(8) + bytes(2000),
        b"\x5f" + b"\x40" * 2000 + b"\xff",
        bytes(cbor.MAX_BYTES + 1),
    ):
        with pytest.raises(AttestationError):
            cbor.decode(data)


def test_maps_are_encoded_in_the_order_of_their_keys_bytes():
    assert cbor.encode({"b": 1, 10: 2, "aa": 3, -1: 4}).hex() == "a40a022004616201626161" + "03"


@pytest.mark.parametrize("value", [1.5, 2**64, -(2**64) - 1, object()])
def test_what_cannot_be_read_back_is_not_encoded(value):
    with pytest.raises(MisuseError):
        cbor.encode(value)
