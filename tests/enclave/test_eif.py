from __future__ import annotations

import hashlib
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enclave import eif
from enclave.errors import EifError

_HEADER_BYTES = 548
_CRC_AT = 544


def _bytes(image: eif.Image) -> bytes:
    return b"".join(eif.pack(image))


def _with_crc(data: bytearray) -> bytes:
    """Return `data` with a CRC that fits, so that a reader gets to look at the rest."""
    crc = zlib.crc32(data[_HEADER_BYTES:], zlib.crc32(data[:_CRC_AT]))
    return bytes(data[:_CRC_AT]) + struct.pack(">I", crc) + bytes(data[_HEADER_BYTES:])


def _extended(*parts: bytes) -> bytes:
    return hashlib.sha384(bytes(48) + hashlib.sha384(b"".join(parts)).digest()).digest()


def test_image_reads_back(image: eif.Image) -> None:
    assert eif.unpack(_bytes(image)) == image


def test_header_is_where_the_format_puts_it(image: eif.Image) -> None:
    data = _bytes(image)
    assert data[:8] == b".eif" + bytes([0, 4, 0, 0])
    assert struct.unpack_from(">QQHH", data, 8) == (1 << 30, 2, 0, 5)
    assert struct.unpack_from(">Q", data, 28) == (_HEADER_BYTES,)
    assert struct.unpack_from(">Q", data, 28 + 32 * 8) == (len(b"kernel" * 7),)
    assert struct.unpack_from(">HHQ", data, _HEADER_BYTES) == (1, 0, len(b"kernel" * 7))


def test_registers_cover_what_they_should(image: eif.Image) -> None:
    kernel, cmdline = b"kernel" * 7, b"console=ttyS0"
    first, second = b"base system" * 5, b"stage files" * 3
    assert eif.measure(image) == {
        0: _extended(kernel, cmdline, first, second),
        1: _extended(kernel, cmdline, first),
        2: _extended(second),
    }


def test_one_ramdisk_leaves_register_2_extended_with_nothing(image: eif.Image) -> None:
    pcrs = eif.measure(eif.Image(image.sections[:3]))
    assert pcrs[0] == pcrs[1]
    assert pcrs[2] == _extended()


@pytest.mark.parametrize("index", range(4))
def test_one_byte_of_a_measured_section_changes_register_0(image: eif.Image, index: int) -> None:
    section = image.sections[index]
    changed = eif.Section(section.type, bytes([section.data[0] ^ 1]) + bytes(section.data[1:]))
    other = eif.Image((*image.sections[:index], changed, *image.sections[index + 1 :]))
    before, after = eif.measure(image), eif.measure(other)
    assert before[0] != after[0]
    assert (before[1] != after[1]) == (index < 3)
    assert (before[2] != after[2]) == (index == 3)


def test_every_truncation_is_refused(image: eif.Image) -> None:
    data = _bytes(image)
    for length in range(len(data)):
        with pytest.raises(EifError):
            eif.unpack(data[:length])


def test_every_changed_byte_is_refused(image: eif.Image) -> None:
    data = _bytes(image)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x01
        with pytest.raises(EifError):
            eif.unpack(bytes(damaged))


def test_bytes_after_the_last_section_are_refused(image: eif.Image) -> None:
    with pytest.raises(EifError, match="after the last section"):
        eif.unpack(_with_crc(bytearray(_bytes(image) + b"x")))


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"FIE.", "no enclave image"),
        (4, b"\0\3", "version 3"),
        (6, b"\0\2", "unknown flags"),
        (24, b"\0\1", "not zero"),
        (26, b"\0\x21", "33 sections"),
        (26, b"\0\4", "not zero"),
        (28 + 8, struct.pack(">Q", _HEADER_BYTES), "was due"),
        (28 + 8, struct.pack(">Q", (1 << 64) - 1), "was due"),
        (284, struct.pack(">Q", (1 << 64) - 1), "cut short"),
        (284, struct.pack(">Q", 1), "the header says 1"),
        (540, b"\0\0\0\1", "not zero"),
        (_HEADER_BYTES, b"\0\6", "section type 6"),
        (_HEADER_BYTES, b"\0\2", "0 kernel sections"),
        (_HEADER_BYTES + 2, b"\0\1", "section flags"),
    ],
)
def test_inconsistent_header_is_refused_though_its_crc_fits(
    image: eif.Image, offset: int, value: bytes, reason: str
) -> None:
    data = bytearray(_bytes(image))
    data[offset : offset + len(value)] = value
    with pytest.raises(EifError, match=reason):
        eif.unpack(_with_crc(data))


def test_arm_flag_is_accepted(image: eif.Image) -> None:
    arm = eif.Image(image.sections, flags=eif.FLAG_ARM64)
    assert eif.unpack(_bytes(arm)).flags == eif.FLAG_ARM64


@pytest.mark.parametrize("missing", range(2))
def test_image_without_kernel_or_command_line_is_refused(image: eif.Image, missing: int) -> None:
    with pytest.raises(EifError, match="not one"):
        eif.Image(image.sections[:missing] + image.sections[missing + 1 :])


def test_out_of_range_default_is_refused(image: eif.Image) -> None:
    with pytest.raises(EifError, match="out of range"):
        _bytes(eif.Image(image.sections, default_cpus=-1))


def test_too_many_sections_are_refused(image: eif.Image) -> None:
    with pytest.raises(EifError, match="more than 32"):
        eif.Image(image.sections + (image.sections[3],) * 28)


@given(st.binary(max_size=700))
def test_any_bytes_raise_eif_error(data: bytes) -> None:
    with pytest.raises(EifError):
        eif.unpack(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_damage_under_a_fitting_crc_reads_or_raises_eif_error(
    image: eif.Image, data: st.DataObject
) -> None:
    damaged = bytearray(_bytes(image))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = eif.unpack(_with_crc(damaged))
    except EifError:
        return
    assert _bytes(read) == _with_crc(damaged)


@given(st.binary(max_size=200))
def test_any_signature_section_reads_or_raises_eif_error(data: bytes) -> None:
    try:
        certificate, message = eif.read_signature(data)
    except EifError:
        return
    assert eif.read_signature(eif.write_signature(certificate, message)) == (certificate, message)
