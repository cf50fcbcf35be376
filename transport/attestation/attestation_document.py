"""The attestation document inside a COSE_Sign1: its fields, types and limits.

Source: AWS Nitro Enclaves, "Verifying the root of trust", attestation document specification.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from transport.attestation import cbor
from transport.errors import AttestationError, MisuseError
from transport.frozen import frozen

DIGEST: Final = "SHA384"
PCR_BYTES: Final = 48  # what SHA-384 gives; 32 and 64 belong to digests that are refused
NUM_PCRS: Final = 32  # indices 0 to 31
MAX_MODULE_ID_BYTES: Final = 256
MAX_CERTIFICATE_BYTES: Final = 1024
MAX_PUBLIC_KEY_BYTES: Final = 1024
MAX_USER_DATA_BYTES: Final = 512
MAX_NONCE_BYTES: Final = 512

_REQUIRED: Final = frozenset(
    {"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"}
)
_OPTIONAL: Final = frozenset({"public_key", "user_data", "nonce"})


@frozen
class Document:
    """A well-formed attestation document; what it says counts only under a verified signature."""

    module_id: str
    timestamp_ms: int  # Unix time
    pcrs: Mapping[int, bytes]  # index -> 48 bytes
    certificate: bytes  # leaf, DER
    cabundle: tuple[bytes, ...]  # root first, DER
    public_key: bytes | None = None
    user_data: bytes | None = None
    nonce: bytes | None = None

    def encode(self) -> bytes:
        """The payload bytes, deterministic."""
        return cbor.encode(
            {
                "module_id": self.module_id,
                "digest": DIGEST,
                "timestamp": self.timestamp_ms,
                "pcrs": self.pcrs,
                "certificate": self.certificate,
                "cabundle": self.cabundle,
                "public_key": self.public_key,
                "user_data": self.user_data,
                "nonce": self.nonce,
            }
        )


def require_measurements(measurements: Mapping[int, bytes]) -> None:
    """Checks local measurements. Raises: MisuseError on one that no PCR can hold."""
    for index, digest in measurements.items():
        if not 0 <= index < NUM_PCRS or len(digest) != PCR_BYTES:
            raise MisuseError(
                f"measurement {index}={digest.hex()} is not a PCR of 0 to {NUM_PCRS - 1} "
                f"with {PCR_BYTES} bytes"
            )


def parse(payload: bytes) -> Document:
    """The document in a payload. Raises: AttestationError ("cbor" or "document")."""
    fields = cbor.decode(payload)
    if not isinstance(fields, dict):
        raise _refused(f"is a {type(fields).__name__}, expected a map")
    names = set(fields)
    if missing := sorted(_REQUIRED - names):
        raise _refused(f"lacks {', '.join(missing)}")
    # An unknown field may change what the known ones mean: refused until it is understood.
    if unknown := sorted(map(repr, names - _REQUIRED - _OPTIONAL)):
        raise _refused(f"has unknown fields {', '.join(unknown):.120}")
    if fields["digest"] != DIGEST:
        raise _refused(f"digest is {fields['digest']!r:.40}, expected {DIGEST}")
    return Document(
        module_id=_module_id(fields["module_id"]),
        timestamp_ms=_timestamp(fields["timestamp"]),
        pcrs=_pcrs(fields["pcrs"]),
        certificate=_bytes("certificate", fields["certificate"], 1, MAX_CERTIFICATE_BYTES),
        cabundle=_cabundle(fields["cabundle"]),
        public_key=_optional("public_key", fields, MAX_PUBLIC_KEY_BYTES),
        user_data=_optional("user_data", fields, MAX_USER_DATA_BYTES),
        nonce=_optional("nonce", fields, MAX_NONCE_BYTES),
    )


def _refused(detail: str) -> AttestationError:
    return AttestationError("document", detail)


def _module_id(value: cbor.Value) -> str:
    if not isinstance(value, str) or not 0 < len(value.encode()) <= MAX_MODULE_ID_BYTES:
        raise _refused(f"module_id {value!r:.40} is not a text of 1 to {MAX_MODULE_ID_BYTES} bytes")
    return value


def _timestamp(value: cbor.Value) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _refused(f"timestamp {value!r:.40} is not a positive integer")
    return value


def _pcrs(value: cbor.Value) -> Mapping[int, bytes]:
    if not isinstance(value, dict) or not value:
        raise _refused("pcrs is not a map with entries")
    pcrs: dict[int, bytes] = {}
    for index, digest in value.items():
        if not isinstance(index, int) or not 0 <= index < NUM_PCRS:
            raise _refused(f"PCR index {index!r:.40} is not 0 to {NUM_PCRS - 1}")
        pcrs[index] = _bytes(f"PCR {index}", digest, PCR_BYTES, PCR_BYTES)
    return MappingProxyType(pcrs)


def _cabundle(value: cbor.Value) -> tuple[bytes, ...]:
    if not isinstance(value, list) or not value:
        raise _refused("cabundle is not a list with entries")
    return tuple(_bytes("a cabundle entry", der, 1, MAX_CERTIFICATE_BYTES) for der in value)


def _optional(name: str, fields: Mapping[cbor.Key, cbor.Value], maximum: int) -> bytes | None:
    value = fields.get(name)
    return None if value is None else _bytes(name, value, 0, maximum)


def _bytes(name: str, value: cbor.Value, minimum: int, maximum: int) -> bytes:
    if not isinstance(value, bytes):
        raise _refused(f"{name} is a {type(value).__name__}, expected bytes")
    if not minimum <= len(value) <= maximum:
        raise _refused(f"{name} has {len(value)} bytes, allowed: {minimum} to {maximum}")
    return value
