"""The one line that a person carries from a machine to home: address, key and one-time secret.

    VP1- and base32 of: 32 bytes key | 16 bytes secret | address | 4 bytes SHA-256 of all before

Capitals, digits and a dash, so that a QR code takes it in its densest alphabet.
"""

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass
from typing import TypeGuard

from pipeline.errors import InputError
from transport.address import MAX_TCP_PORT
from transport.dial_and_listen import Endpoint, TcpEndpoint, parse_endpoint
from transport.errors import EndpointError

PREFIX = "VP1-"
KEY_BYTES = 32
SECRET_BYTES = 16
CHECKSUM_BYTES = 4
MAX_LINE = 1024
_PSK_CONTEXT = b"veilpipe-offer/1"


@dataclass(frozen=True, slots=True)
class OfferLine:
    """What home needs to meet a machine for the first time."""

    endpoint: TcpEndpoint
    key: bytes
    secret: bytes

    @classmethod
    def new(cls, endpoint: TcpEndpoint, key: bytes) -> "OfferLine":
        """A line with a fresh secret."""
        return cls(endpoint, key, secrets.token_bytes(SECRET_BYTES))

    @property
    def psk(self) -> bytes:
        """The secret as the handshake takes it, 32 bytes."""
        return hashlib.sha256(_PSK_CONTEXT + self.secret).digest()

    def __str__(self) -> str:
        """The line."""
        payload = self.key + self.secret + str(self.endpoint).encode()
        return PREFIX + base64.b32encode(payload + _checksum(payload)).decode().rstrip("=")


def is_place(endpoint: Endpoint | None) -> TypeGuard[TcpEndpoint]:
    """Whether a machine may be there: it takes the data of its stage at the next port."""
    return isinstance(endpoint, TcpEndpoint) and 0 < endpoint.port < MAX_TCP_PORT


def parse_offer_line(text: str) -> OfferLine:
    """Read a line as a person has copied it. Raises InputError saying what is wrong with it."""
    line = "".join(text.split()).strip("'\"`").upper()
    if not line.startswith(PREFIX):
        shown = line[:12] if line.isascii() and line.isprintable() else "that"
        what = "of another version" if line.startswith("VP") and "-" in line[:6] else "no such line"
        raise InputError(f"{shown!r} is {what}; `stage-worker offer` prints one, from {PREFIX} on")
    body = line[len(PREFIX) :]
    try:
        if len(line) > MAX_LINE:
            raise ValueError("too long")
        data = base64.b32decode(body + "=" * (-len(body) % 8))
        payload, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        if checksum != _checksum(payload) or len(payload) < KEY_BYTES + SECRET_BYTES:
            raise ValueError("checksum")
        key, rest = payload[:KEY_BYTES], payload[KEY_BYTES:]
        endpoint = parse_endpoint(rest[SECRET_BYTES:].decode())
        if not is_place(endpoint):
            raise EndpointError("no place for a machine")
    except (ValueError, binascii.Error, EndpointError) as error:
        raise InputError(
            f"the line {line[:12]}… is mistyped or not whole; copy it again from the machine"
        ) from error
    return OfferLine(endpoint, key, rest[:SECRET_BYTES])


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + payload).digest()[:CHECKSUM_BYTES]
