"""The Nitro Security Module of the enclave this process runs in, through its character device.

A request and its response are CBOR, exchanged by one ioctl that takes two `struct iovec`.
Source: Linux include/uapi/linux/nsm.h; AWS Nitro Enclaves NSM API.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from transport.attestation import cbor
from transport.attestation.attestation_document import NUM_PCRS, PCR_BYTES
from transport.attestation.evidence_binding import Binding, EvidenceKind, user_data
from transport.errors import AttestationError, DeviceError, MisuseError
from transport.frozen import frozen

DEVICE: Final = Path("/dev/nsm")
NSM_IOCTL: Final = 0xC0200A00  # _IOWR(0x0A, 0, 32 bytes)
MAX_REQUEST_BYTES: Final = 0x1000  # what the driver takes
MAX_RESPONSE_BYTES: Final = 0x3000  # what the driver gives at most

# struct nsm_raw: request address and length, response address and length
_RAW: Final = struct.Struct("=QQQQ")

Ioctl = Callable[[int, int, bytearray, bool], int]


@frozen
class Description:
    """What the module says of itself."""

    version: tuple[int, int, int]
    module_id: str
    max_pcrs: int
    locked_pcrs: frozenset[int]
    digest: str


@frozen
class Pcr:
    """One platform configuration register."""

    digest: bytes  # 48 bytes
    is_locked: bool


class Nsm:
    """The module's requests, each one exchange with the device.

    Raises: DeviceError, from every request, where the device is missing or refuses.
    """

    def __init__(self, device: Path = DEVICE, *, ioctl: Ioctl = fcntl.ioctl) -> None:
        self._device = device
        self._ioctl = ioctl

    def describe(self) -> Description:
        """The module's version, id and registers. Raises: DeviceError."""
        match self._ask("DescribeNSM", "DescribeNSM"):
            case {
                "version_major": int() as major,
                "version_minor": int() as minor,
                "version_patch": int() as patch,
                "module_id": str() as module_id,
                "max_pcrs": int() as max_pcrs,
                "locked_pcrs": list() as locked,
                "digest": str() as digest,
            }:
                pcrs = frozenset(index for index in locked if isinstance(index, int))
                return Description((major, minor, patch), module_id, max_pcrs, pcrs, digest)
        raise self._unexpected("DescribeNSM")

    def describe_pcr(self, index: int) -> Pcr:
        """One register. Raises: DeviceError, MisuseError on an index that no module has."""
        if not 0 <= index < NUM_PCRS:
            raise MisuseError(f"PCR index {index} is not 0 to {NUM_PCRS - 1}")
        match self._ask("DescribePCR", {"DescribePCR": {"index": index}}):
            case {"data": bytes() as digest, "lock": bool() as is_locked} if (
                len(digest) == PCR_BYTES
            ):
                return Pcr(digest, is_locked)
        raise self._unexpected("DescribePCR")

    def random(self) -> bytes:
        """Fresh random bytes, as many as one answer holds (256). Raises: DeviceError."""
        match self._ask("GetRandom", "GetRandom"):
            case {"random": bytes() as fresh} if fresh:
                return fresh
        raise self._unexpected("GetRandom")

    def attest(self, *, user_data: bytes, public_key: bytes, nonce: bytes) -> bytes:
        """A signed attestation document that holds the three values. Raises: DeviceError."""
        fields = {"user_data": user_data, "public_key": public_key, "nonce": nonce}
        match self._ask("Attestation", {"Attestation": fields}):
            case {"document": bytes() as document} if document:
                return document
        raise self._unexpected("Attestation")

    def _ask(self, name: str, request: cbor.Encodable) -> cbor.Value:
        """The body of the response to a request."""
        try:
            response = cbor.decode(self._exchange(cbor.encode(request)))
        except AttestationError as error:
            raise DeviceError(f"{self._device} answered {name} with {error.detail}") from error
        match response:
            case {"Error": reason}:
                raise DeviceError(f"{self._device} refused {name}: {reason!r:.80}")
            case dict() if len(response) == 1 and name in response:
                return response[name]
        raise self._unexpected(name)

    def _unexpected(self, name: str) -> DeviceError:
        return DeviceError(f"{self._device} answered {name} with something else")

    def _exchange(self, request: bytes) -> bytes:
        if len(request) > MAX_REQUEST_BYTES:
            raise MisuseError(f"request has {len(request)} bytes, allowed: {MAX_REQUEST_BYTES}")
        sent = ctypes.create_string_buffer(request, len(request))
        received = ctypes.create_string_buffer(MAX_RESPONSE_BYTES)
        raw = bytearray(
            _RAW.pack(
                ctypes.addressof(sent), len(request), ctypes.addressof(received), len(received)
            )
        )
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._ioctl(descriptor, NSM_IOCTL, raw, True)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unusable(error) from error
        num_bytes = _RAW.unpack(raw)[3]
        if num_bytes > MAX_RESPONSE_BYTES:
            raise DeviceError(f"{self._device} claims an answer of {num_bytes} bytes")
        return received.raw[:num_bytes]

    def _unusable(self, error: OSError) -> DeviceError:
        remedy = (
            "run inside a Nitro Enclave, or choose another kind of evidence"
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTTY)
            else "check the device and its permissions"
        )
        return DeviceError(f"security module {self._device}: {error.strerror}; {remedy}")


class NsmAttester:
    """Evidence of a Nitro Enclave, signed by its security module.

    Raises: DeviceError at once where there is no module, not first in the handshake.
    """

    kind = EvidenceKind.NITRO

    def __init__(self, device: Path = DEVICE, *, ioctl: Ioctl = fcntl.ioctl) -> None:
        self._nsm = Nsm(device, ioctl=ioctl)
        self._nsm.describe()

    def attest(self, binding: Binding) -> bytes:
        """The module's document bound to the handshake. Raises: DeviceError."""
        return self._nsm.attest(
            user_data=user_data(binding), public_key=binding.static_key, nonce=binding.nonce
        )
