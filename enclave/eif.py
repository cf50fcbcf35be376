"""Enclave image files (EIF, version 4) and the measurements they boot with.

Layout, all integers big-endian; a CRC-32 covers everything but itself:

    header   magic ".eif"  version u16  flags u16  default memory u64  default CPUs u64
             reserved u16  sections u16  offsets u64[32]  sizes u64[32]  unused u32  CRC-32 u32
    section  type u16  flags u16  size u64  data

Source: the AWS Nitro Enclaves image format, as its public reader and QEMU's understand it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from enclave import cbor
from enclave.errors import CborError, EifError

Buffer = bytes | bytearray | memoryview

MAGIC: Final = b".eif"
VERSION: Final = 4
FLAG_ARM64: Final = 1
MAX_SECTIONS: Final = 32
PCR_BYTES: Final = 48
MAX_SIGNATURE_BYTES: Final = 32768  # nitro-cli's own limit

_HEADER: Final = struct.Struct(">4sHHQQHH32Q32QII")
_SECTION: Final = struct.Struct(">HHQ")
_PEM_BEGIN: Final = b"-----BEGIN CERTIFICATE-----"
_PEM_END: Final = b"-----END CERTIFICATE-----"


class SectionType(IntEnum):
    """What a section holds."""

    KERNEL = 1
    CMDLINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5


_MEASURED: Final = frozenset({SectionType.KERNEL, SectionType.CMDLINE, SectionType.RAMDISK})


@dataclass(frozen=True, slots=True)
class Section:
    """One section; `data` may be a view of a mapped file."""

    type: SectionType
    data: Buffer


@dataclass(frozen=True, slots=True)
class Image:
    """An image: its sections in file order, and the resources it asks for by default.

    Exactly one kernel and one command line, one ramdisk or more, at most one signature and one
    metadata section, none empty. Raises: EifError otherwise.
    """

    sections: tuple[Section, ...]
    default_memory_bytes: int = 0
    default_cpus: int = 0
    flags: int = 0

    def __post_init__(self) -> None:
        counts = {kind: len(self.of_type(kind)) for kind in SectionType}
        for kind in (SectionType.KERNEL, SectionType.CMDLINE):
            if counts[kind] != 1:
                raise EifError(f"{counts[kind]} {kind.name.lower()} sections, not one")
        if counts[SectionType.RAMDISK] == 0:
            raise EifError("no ramdisk section")
        for kind in (SectionType.SIGNATURE, SectionType.METADATA):
            if counts[kind] > 1:
                raise EifError(f"{counts[kind]} {kind.name.lower()} sections, more than one")
        if len(self.sections) > MAX_SECTIONS:
            raise EifError(f"{len(self.sections)} sections, more than {MAX_SECTIONS}")
        if self.flags & ~FLAG_ARM64:
            raise EifError(f"unknown flags {self.flags:#06x}")
        if any(len(section.data) == 0 for section in self.sections):
            raise EifError("an empty section")

    def of_type(self, kind: SectionType) -> tuple[Buffer, ...]:
        """Return the data of every section of one type, in file order."""
        return tuple(section.data for section in self.sections if section.type is kind)

    def with_section(self, section: Section) -> Image:
        """Return this image with one more section at its end. Raises: EifError if it may not be."""
        sections = (*self.sections, section)
        return Image(sections, self.default_memory_bytes, self.default_cpus, self.flags)


def pack(image: Image) -> Iterator[Buffer]:
    """Yield the image file piece by piece; the same image always gives the same bytes.

    Raises: EifError when the memory or the CPUs do not fit their fields.
    """
    sizes = [len(section.data) for section in image.sections]
    offsets, offset = [], _HEADER.size
    for size in sizes:
        offsets.append(offset)
        offset += _SECTION.size + size
    unused = [0] * (MAX_SECTIONS - len(sizes))
    fields = (MAGIC, VERSION, image.flags, image.default_memory_bytes, image.default_cpus)
    tables = (0, len(sizes), *offsets, *unused, *sizes, *unused, 0)
    body = [
        piece
        for section in image.sections
        for piece in (_SECTION.pack(section.type, 0, len(section.data)), section.data)
    ]
    try:
        header = _HEADER.pack(*fields, *tables, 0)
    except struct.error as error:
        raise EifError(f"a header field is out of range: {error}") from error
    yield header[:-4] + struct.pack(">I", _crc32((header[:-4], *body)))
    yield from body


def unpack(data: Buffer) -> Image:
    """Return the image `data` holds; sections are views of it, nothing is copied.

    Strict: sections follow the header and one another without gap, overlap or rest, flags and sizes
    agree, the CRC matches. Raises: EifError.
    """
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise EifError(f"{len(view)} bytes are no image: the header alone has {_HEADER.size}")
    magic, version, flags, memory, cpus, reserved, count, *rest = _HEADER.unpack_from(view)
    offsets, sizes = rest[:MAX_SECTIONS], rest[MAX_SECTIONS : 2 * MAX_SECTIONS]
    unused, crc = rest[-2:]
    if magic != MAGIC:
        raise EifError(f"no enclave image: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise EifError(f"image version {version}, not {VERSION}")
    if count > MAX_SECTIONS:
        raise EifError(f"{count} sections, more than {MAX_SECTIONS}")
    # Bytes nobody reads would let two different files pass for one image.
    if reserved or unused or any(offsets[count:]) or any(sizes[count:]):
        raise EifError("unused header fields are not zero")
    sections = tuple(_unpack_sections_untrusted(view, offsets[:count], sizes[:count]))
    computed = _crc32((view[: _HEADER.size - 4], view[_HEADER.size :]))
    if computed != crc:
        raise EifError(f"CRC-32 is {computed:08x}, the header says {crc:08x}")
    return Image(sections, memory, cpus, flags)


def measure(image: Image) -> dict[int, bytes]:
    """Return the registers the image boots with: PCR0-2, and PCR8 when it is signed.

    PCR0 covers kernel, command line and all ramdisks, in file order; PCR1 the same but only the
    first ramdisk; PCR2 the other ramdisks; PCR8 the signing certificate.
    Raises: EifError for a damaged certificate.
    """
    parts = [section for section in image.sections if section.type in _MEASURED]
    ramdisks = [section for section in parts if section.type is SectionType.RAMDISK]
    later = {id(section) for section in ramdisks[1:]}
    pcrs = {
        0: _register(parts),
        1: _register(section for section in parts if id(section) not in later),
        2: _register(ramdisks[1:]),
    }
    for signature in image.of_type(SectionType.SIGNATURE):
        certificate_pem, _ = read_signature(signature)
        der = certificate_der(certificate_pem)
        pcrs[8] = _register([Section(SectionType.SIGNATURE, der)])
    return pcrs


def read_signature(section: Buffer) -> tuple[bytes, bytes]:
    """Return certificate (PEM) and COSE_Sign1 bytes of a signature section. Raises: EifError."""
    if len(section) > MAX_SIGNATURE_BYTES:
        raise EifError(f"signature section of {len(section)} bytes, over {MAX_SIGNATURE_BYTES}")
    try:
        item = cbor.decode(bytes(section))
    except CborError as error:
        raise EifError(f"signature section: {error}") from error
    fields = item[0] if isinstance(item, list) and len(item) == 1 else None
    if not isinstance(fields, dict) or set(fields) != {"signing_certificate", "signature"}:
        raise EifError("signature section does not hold one signature with its certificate")
    return _octets(fields["signing_certificate"]), _octets(fields["signature"])


def write_signature(certificate_pem: bytes, cose_sign1: bytes) -> bytes:
    """Return a signature section's data."""
    # The reference writer puts byte strings down as arrays of numbers, and readers expect that.
    return cbor.encode(
        [{"signing_certificate": list(certificate_pem), "signature": list(cose_sign1)}]
    )


def _unpack_sections_untrusted(
    view: memoryview, offsets: list[int], sizes: list[int]
) -> Iterator[Section]:
    expected = _HEADER.size
    for offset, size in zip(offsets, sizes, strict=True):
        if offset != expected:
            raise EifError(f"a section at byte {offset}, where {expected} was due", offset=offset)
        start = offset + _SECTION.size
        if start + size > len(view):
            raise EifError(f"section of {size} bytes is cut short", offset=offset)
        kind, section_flags, own_size = _SECTION.unpack_from(view, offset)
        if own_size != size:
            raise EifError(f"section of {own_size} bytes, the header says {size}", offset=offset)
        if section_flags:
            raise EifError(f"unknown section flags {section_flags:#06x}", offset=offset)
        if kind not in SectionType.__members__.values():
            raise EifError(f"unknown section type {kind}", offset=offset)
        yield Section(SectionType(kind), view[start : start + size])
        expected = start + size
    if expected != len(view):
        raise EifError(f"{len(view) - expected} bytes after the last section", offset=expected)


def _octets(item: cbor.Item) -> bytes:
    """Return the bytes of a byte string, or of an array of numbers below 256."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, list):
        octets = [each for each in item if type(each) is int and 0 <= each < 256]
        if len(octets) == len(item):
            return bytes(octets)
    raise EifError("a field of the signature is no byte string")


def certificate_der(pem: bytes) -> bytes:
    """Return the DER form of the first certificate in `pem`. Raises: EifError."""
    start, end = pem.find(_PEM_BEGIN), pem.find(_PEM_END)
    if start < 0 or end < start:
        raise EifError("the signing certificate is not in PEM form")
    body = b"".join(pem[start + len(_PEM_BEGIN) : end].split())
    try:
        return b64decode(body, validate=True)
    except Base64Error as error:
        raise EifError(f"the signing certificate's base64 is damaged: {error}") from error


def _register(sections: Iterable[Section]) -> bytes:
    """Return a fresh register extended once: SHA384(0^48 | SHA384(data of the sections))."""
    digest = hashlib.sha384()
    for section in sections:
        digest.update(section.data)
    return hashlib.sha384(bytes(PCR_BYTES) + digest.digest()).digest()


def _crc32(parts: Iterable[Buffer]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc
