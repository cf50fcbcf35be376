"""The four messages of the proto in DOORS.md, as protobuf encodes them.

By hand, because the fields are few and flat and the largest is the message: what is read refers to
the body it came in, and what is written refers to the tensor, where protobuf's own library copies
either, and ties generated code to its version.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.doors.messages import (
    AttestRequest,
    AttestResponse,
    DoorError,
    DoorFault,
    InferRequest,
    InferResponse,
    Payload,
)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_MAX_DIMS = 16  # no tensor has more; attack: a body of nothing but dimensions


@dataclass(frozen=True, slots=True)
class _Kind:
    """How fields of a kind are told apart, read and written."""

    wire_type: int
    empty: Any
    read: Callable[[Any], Any]
    write: Callable[[Any], Payload]


def encode(message: object) -> list[Payload]:
    """The message's encoding, in parts that are to be sent one after the other."""
    parts: list[Payload] = []
    for number, (name, kind) in _FIELDS[type(message)].items():
        value = getattr(message, name)
        if value == kind.empty or (kind.wire_type == _BYTES and not len(value)):
            continue
        body = kind.write(value)
        tag = _varint(number << 3 | kind.wire_type)
        if kind.wire_type == _BYTES:
            tag += _varint(len(body))
        parts += [tag, body]
    return parts


def decode_infer_request_untrusted(body: Payload) -> InferRequest:
    """Read a request; its byte fields refer to `body`. Raises DoorError."""
    return InferRequest(**_decode(InferRequest, body))


def decode_infer_response_untrusted(body: Payload) -> InferResponse:
    """Read an answer; its byte fields refer to `body`. Raises DoorError."""
    return InferResponse(**_decode(InferResponse, body))


def decode_attest_request_untrusted(body: Payload) -> AttestRequest:
    """Read a request for evidence. Raises DoorError."""
    return AttestRequest(nonce=bytes(_decode(AttestRequest, body)["nonce"]))


def decode_attest_response_untrusted(body: Payload) -> AttestResponse:
    """Read an answer with evidence. Raises DoorError."""
    found = _decode(AttestResponse, body)
    is_bytes = ("public_key", "core_hash", "evidence")
    return AttestResponse(**found | {name: bytes(found[name]) for name in is_bytes})


def _decode(message_type: type, body: Payload) -> dict[str, Any]:
    """The fields by name; of a field that is there twice the last one, as proto3 has it."""
    fields = _FIELDS[message_type]
    found = {name: kind.empty for name, kind in fields.values()}
    try:
        for number, wire_type, value in _read_fields(memoryview(body).toreadonly()):
            name, kind = fields.get(number, (None, None))
            if kind is None or name is None:
                continue  # of a later version of the proto
            if kind is _INT64S and wire_type in {_BYTES, _VARINT}:
                dims = _read_varints(value) if wire_type == _BYTES else [_signed(value)]
                found[name] = (*found[name], *dims)
                if len(found[name]) > _MAX_DIMS:
                    raise ValueError(f"{name} has more than {_MAX_DIMS} dimensions")
            elif wire_type != kind.wire_type:
                raise ValueError(f"{name} is of another type")
            else:
                found[name] = kind.read(value)
    except ValueError as error:
        raise DoorError(
            DoorFault.INVALID, f"the message is no {message_type.__name__}: {error}"
        ) from error
    return found


def _read_fields(view: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of each field. Raises ValueError."""
    at = 0
    while at < len(view):
        tag, at = _read_varint(view, at)
        number, wire_type = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError("a field has no number")
        value: Any
        if wire_type == _VARINT:
            value, at = _read_varint(view, at)
            yield number, wire_type, value
            continue
        if wire_type == _BYTES:
            size, at = _read_varint(view, at)
        elif wire_type in {_FIXED64, _FIXED32}:
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError("a field's type is unknown")
        if size > len(view) - at:
            raise ValueError("it ends within a field")
        yield number, wire_type, view[at : at + size]
        at += size


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(view[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & (1 << 64) - 1, at + index + 1
    raise ValueError("a number does not end")


def _read_varints(view: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(view):
        value, at = _read_varint(view, at)
        values.append(_signed(value))
        if len(values) > _MAX_DIMS:
            break
    return values


def _varint(value: int) -> bytes:
    """A number below 2^64; a negative one as its two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _signed32(value: int) -> int:
    value &= (1 << 32) - 1
    return value - (1 << 32) if value >> 31 else value


def _read_float(view: memoryview) -> float:
    value: float = struct.unpack("<f", view)[0]
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value


def _read_text(view: memoryview) -> str:
    try:
        return str(view, "utf-8")
    except UnicodeDecodeError:
        raise ValueError("a text is not UTF-8") from None


_PAYLOAD = _Kind(_BYTES, b"", lambda view: view, lambda payload: memoryview(payload).cast("B"))
_TEXT = _Kind(_BYTES, "", _read_text, str.encode)
_INT32 = _Kind(_VARINT, 0, _signed32, _varint)
_INT64S = _Kind(_BYTES, (), _read_varints, lambda values: b"".join(map(_varint, values)))
_FLOAT = _Kind(_FIXED32, 0.0, _read_float, lambda value: struct.pack("<f", value))

_FIELDS: Mapping[type, Mapping[int, tuple[str, _Kind]]] = {
    InferRequest: {
        1: ("cloaked_embedding", _PAYLOAD),
        2: ("encrypted_session_key", _PAYLOAD),
        3: ("nonce", _PAYLOAD),
        4: ("shape", _INT64S),
        5: ("dtype", _TEXT),
        6: ("session_id", _TEXT),
        7: ("max_new_tokens", _INT32),
        8: ("temperature", _FLOAT),
    },
    InferResponse: {
        1: ("output", _PAYLOAD),
        2: ("shape", _INT64S),
        3: ("dtype", _TEXT),
        4: ("tokens_processed", _INT32),
        5: ("error", _TEXT),
    },
    AttestRequest: {1: ("nonce", _PAYLOAD)},
    AttestResponse: {
        1: ("public_key", _PAYLOAD),
        2: ("core_hash", _PAYLOAD),
        3: ("evidence_kind", _TEXT),
        4: ("evidence", _PAYLOAD),
    },
}
