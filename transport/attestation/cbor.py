"""The part of CBOR that attestation documents and the NSM use, read strictly.

Left out and refused: tags, floats, `undefined`, map keys other than integers and text. Refused as
ambiguous: duplicate keys and trailing bytes, with which two readers could see two documents in the
same signed bytes. Indefinite lengths are read, since security modules write them.
Source: RFC 8949.
"""

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from transport.errors import AttestationError, MisuseError

Key: TypeAlias = int | str
Value: TypeAlias = "int | bytes | str | bool | list[Value] | dict[Key, Value] | None"
Encodable: TypeAlias = (
    "int | bytes | str | bool | Sequence[Encodable] | "
    "Mapping[int, Encodable] | Mapping[str, Encodable] | None"
)

MAX_BYTES: Final = 64 * 1024  # several times the largest NSM response (12 KiB)
MAX_DEPTH: Final = 8  # a document nests three deep; bounds the recursion an attacker can cause
MAX_ITEMS: Final = 1024  # a document has about 60; bounds the objects made of one-byte items

_UINT, _NINT, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_INDEFINITE: Final = 31
_BREAK: Final = 0xFF
_SIMPLE_VALUES: Final[Mapping[int, bool | None]] = {20: False, 21: True, 22: None}


def decode(data: bytes) -> Value:
    """The single item that the bytes hold. Raises: AttestationError with check "cbor"."""
    if len(data) > MAX_BYTES:
        raise _refused(f"{len(data)} bytes, allowed: {MAX_BYTES}")
    reader = _Reader(data)
    value = reader.read_item(depth=0)
    if reader.position != len(data):
        raise _refused(f"{len(data) - reader.position} bytes after the end of the item")
    return value


def _refused(detail: str) -> AttestationError:
    return AttestationError("cbor", detail)


class _Reader:
    """Walks the bytes once; no length is believed before that many bytes are known to be there."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._num_items = 0
        self.position = 0

    def read_item(self, depth: int) -> Value:  # noqa: PLR0911  (one per major type)
        self._num_items += 1
        if depth > MAX_DEPTH or self._num_items > MAX_ITEMS:
            raise _refused(f"more than {MAX_DEPTH} levels or {MAX_ITEMS} items")
        major, argument = self._read_head()
        match major:
            case 0:  # _UINT
                return _definite(argument)
            case 1:  # _NINT
                return -1 - _definite(argument)
            case 2:  # _BYTES
                return self._read_string(_BYTES, argument)
            case 3:  # _TEXT
                try:
                    return self._read_string(_TEXT, argument).decode()
                except UnicodeDecodeError as error:
                    raise _refused(f"text is not UTF-8: {error.reason}") from error
            case 4:  # _ARRAY
                return self._read_array(argument, depth)
            case 5:  # _MAP
                return self._read_map(argument, depth)
            case 7 if (simple := _definite(argument)) in _SIMPLE_VALUES:
                return _SIMPLE_VALUES[simple]
        raise _refused(f"major type {major}, argument {argument} is not allowed here")

    def _read_head(self) -> tuple[int, int | None]:
        """Major type and argument; None where the length is indefinite."""
        initial = self._take(1)[0]
        major, info = initial >> 5, initial & 0x1F
        if info < 24:
            return major, info
        if info == _INDEFINITE and major in (_BYTES, _TEXT, _ARRAY, _MAP):
            return major, None
        # Simple values of two bytes and floats share this form; none of them is allowed.
        if info > 27 or major == _SIMPLE:
            raise _refused(f"initial byte 0x{initial:02x} is not allowed here")
        return major, int.from_bytes(self._take(1 << (info - 24)))

    def _take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self._data):
            raise _refused(f"ends inside an item: {end - len(self._data)} bytes are missing")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _is_more(self, num_read: int, count: int | None) -> bool:
        """Whether another element follows; consumes the break of an indefinite length."""
        if count is not None:
            return num_read < count
        if self.position < len(self._data) and self._data[self.position] == _BREAK:
            self.position += 1
            return False
        return True

    def _read_string(self, major: int, length: int | None) -> bytes:
        if length is not None:
            return self._take(length)
        chunks: list[bytes] = []
        while self._is_more(len(chunks), None):
            chunk_major, chunk_length = self._read_head()
            if chunk_major != major or chunk_length is None or len(chunks) == MAX_ITEMS:
                raise _refused("a string of indefinite length holds something other than chunks")
            chunks.append(self._take(chunk_length))
        return b"".join(chunks)

    def _read_array(self, count: int | None, depth: int) -> list[Value]:
        items: list[Value] = []
        while self._is_more(len(items), count):
            items.append(self.read_item(depth + 1))
        return items

    def _read_map(self, count: int | None, depth: int) -> dict[Key, Value]:
        entries: dict[Key, Value] = {}
        while self._is_more(len(entries), count):
            key = self.read_item(depth + 1)
            # True equals 1 in Python: a bool as key would pass for an integer.
            if not isinstance(key, int | str) or isinstance(key, bool):
                raise _refused(f"a map key is a {type(key).__name__}, allowed: integer, text")
            if key in entries:
                raise _refused(f"duplicate map key {key!r:.40}")
            entries[key] = self.read_item(depth + 1)
        return entries


def _definite(argument: int | None) -> int:
    assert argument is not None, "_read_head gives None for strings, arrays and maps alone"
    return argument


def encode(value: Encodable) -> bytes:  # noqa: PLR0911  (one per type)
    """The deterministic encoding: shortest heads, definite lengths, map keys sorted by their bytes.

    Raises: MisuseError on what `decode` would not read.
    """
    match value:
        case bool() | None:
            return bytes([_SIMPLE << 5 | {False: 20, True: 21, None: 22}[value]])
        case int() if value >= 0:
            return _head(_UINT, value)
        case int():
            return _head(_NINT, -1 - value)
        case bytes():
            return _head(_BYTES, len(value)) + value
        case str():
            text = value.encode()
            return _head(_TEXT, len(text)) + text
        case Mapping():
            entries = sorted((encode(key), encode(item)) for key, item in value.items())
            return _head(_MAP, len(entries)) + b"".join(key + item for key, item in entries)
        case Sequence():
            return _head(_ARRAY, len(value)) + b"".join(encode(item) for item in value)
    raise MisuseError(f"a {type(value).__name__} has no encoding here")


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes([major << 5 | argument])
    for info, num_bytes in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if argument < 1 << (8 * num_bytes):
            return bytes([major << 5 | info]) + argument.to_bytes(num_bytes)
    raise MisuseError(f"integer {argument} has more than 64 bits")
