"""The Nitro security module, as init and the boot test need it: one ioctl on /dev/nsm.

Source: Linux include/uapi/linux/nsm.h; requests and responses are CBOR.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path
from typing import Final

from enclave import cbor
from enclave.errors import CborError, NsmError

DEVICE: Final = Path("/dev/nsm")
_IOCTL_RAW: Final = 0xC0200A00  # _IOWR(0x0A, 0, struct nsm_raw)
_MAX_REQUEST_BYTES: Final = 0x1000
_MAX_RESPONSE_BYTES: Final = 0x3000


class _Raw(ctypes.Structure):
    """struct nsm_raw: two buffers, each an address and a length."""

    _fields_ = (
        ("request", ctypes.c_uint64),
        ("request_bytes", ctypes.c_uint64),
        ("response", ctypes.c_uint64),
        ("response_bytes", ctypes.c_uint64),
    )


def call(name: str, arguments: dict[cbor.Item, cbor.Item] | None = None) -> dict[str, cbor.Item]:
    """Ask the module `name` and return its answer's fields. Raises: NsmError."""
    request = cbor.encode(name if arguments is None else {name: arguments})
    if len(request) > _MAX_REQUEST_BYTES:
        raise NsmError(f"request of {len(request)} bytes, over {_MAX_REQUEST_BYTES}")
    try:
        answer = cbor.decode(_exchange(request))
    except CborError as error:
        raise NsmError(f"{name}: {error}") from error
    fields = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(fields, dict):
        raise NsmError(f"{name}: the module answered {answer!r}")
    return {str(key): value for key, value in fields.items()}


def call_bytes(name: str, field: str, arguments: dict[cbor.Item, cbor.Item] | None = None) -> bytes:
    """Ask the module `name` and return one byte string of its answer. Raises: NsmError."""
    value = call(name, arguments).get(field)
    if not isinstance(value, bytes):
        raise NsmError(f"{name}: no {field} in the answer")
    return value


def random_bytes() -> bytes:
    """Return up to 256 bytes of the module's entropy. Raises: NsmError."""
    return call_bytes("GetRandom", "random")


def describe_pcr(index: int) -> bytes:
    """Return one register. Raises: NsmError."""
    return call_bytes("DescribePCR", "data", {"index": index})


def attestation_document(nonce: bytes, user_data: bytes, public_key: bytes) -> bytes:
    """Return a document over the three values. Raises: NsmError."""
    arguments: dict[cbor.Item, cbor.Item] = {
        "user_data": user_data,
        "nonce": nonce,
        "public_key": public_key,
    }
    return call_bytes("Attestation", "document", arguments)


def _exchange(request: bytes) -> bytes:
    response = ctypes.create_string_buffer(_MAX_RESPONSE_BYTES)
    source = ctypes.create_string_buffer(request, len(request))
    raw = _Raw(
        ctypes.addressof(source), len(request), ctypes.addressof(response), _MAX_RESPONSE_BYTES
    )
    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NsmError(f"cannot open {DEVICE}: {error.strerror}") from error
    try:
        fcntl.ioctl(descriptor, _IOCTL_RAW, raw)
    except OSError as error:
        raise NsmError(f"request failed: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return response.raw[: raw.response_bytes]
