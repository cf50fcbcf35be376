from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave import cpio
from enclave.errors import CpioError

_ENTRIES = [
    cpio.regular("bin/init", b"#!/bin/sh\n", 0o755),
    cpio.directory("tmp", 0o1777),
    cpio.symlink("bin/sh", "init"),
    cpio.Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
    cpio.regular("empty", b""),
]


def _pack(entries: list[cpio.Entry]) -> bytes:
    return b"".join(cpio.pack(entries))


def test_archive_reads_back_with_parents_first() -> None:
    entries = list(cpio.unpack(_pack(_ENTRIES)))
    assert [entry.path for entry in entries] == [
        "bin",
        "bin/init",
        "bin/sh",
        "dev",
        "dev/null",
        "empty",
        "tmp",
    ]
    by_path = {entry.path: entry for entry in entries}
    assert bytes(by_path["bin/init"].data) == b"#!/bin/sh\n"
    assert by_path["dev/null"].device == (1, 3)
    assert by_path["tmp"].mode == stat.S_IFDIR | 0o1777
    assert by_path["bin"].mode == stat.S_IFDIR | 0o755


def test_archive_does_not_depend_on_the_order_given() -> None:
    assert _pack(_ENTRIES) == _pack(_ENTRIES[::-1])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio program to compare with")
def test_cpio_program_extracts_the_archive(tmp_path: Path) -> None:
    entries = [entry for entry in _ENTRIES if not stat.S_ISCHR(entry.mode)]
    subprocess.run(
        ["cpio", "-idm", "--quiet"], input=_pack(entries), cwd=tmp_path, check=True, timeout=300
    )
    assert (tmp_path / "bin/sh").readlink() == Path("init")
    assert (tmp_path / "bin/init").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "bin/init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").stat().st_mtime == 0


@pytest.mark.parametrize("path", ["", "/etc", "a//b", "a/../b", "./a", "a/", "TRAILER!!!", "a\0b"])
def test_unclean_path_is_refused(path: str) -> None:
    with pytest.raises(CpioError):
        _pack([cpio.regular(path, b"")])


def test_same_path_twice_is_refused() -> None:
    with pytest.raises(CpioError, match="twice"):
        _pack([cpio.regular("a", b"1"), cpio.regular("a", b"2")])


def test_file_below_a_file_is_refused() -> None:
    with pytest.raises(CpioError, match="no directory"):
        _pack([cpio.regular("a", b"1"), cpio.regular("a/b", b"2")])


def test_every_truncation_is_refused() -> None:
    archive = _pack([cpio.regular("a", b"12345")])
    for length in range(len(archive) - 3):  # the last bytes pad the trailer's name
        with pytest.raises(CpioError):
            list(cpio.unpack(archive[:length]))


_PARTS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=9)
_NAMES = _PARTS.filter(lambda part: part not in {".", "..", "TRAILER!!!"})


@given(st.dictionaries(_NAMES, st.binary(max_size=40), max_size=6))
def test_any_files_read_back(files: dict[str, bytes]) -> None:
    archive = _pack([cpio.regular(path, data) for path, data in files.items()])
    assert {entry.path: bytes(entry.data) for entry in cpio.unpack(archive)} == files
    assert len(archive) % 4 == 0


@given(st.data())
def test_damaged_archive_reads_or_raises_cpio_error(data: st.DataObject) -> None:
    archive = bytearray(_pack(_ENTRIES))
    for _ in range(data.draw(st.integers(1, 4))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    try:
        entries = list(cpio.unpack(bytes(archive)))
    except CpioError:
        return
    assert sum(len(entry.data) for entry in entries) <= len(archive)
