from __future__ import annotations

import re
from pathlib import Path

import pytest

from enclave import build, cpio, eif
from enclave.errors import BuildError

_KERNEL = bytes(514) + b"HdrS" + bytes(100)


def _stage(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def test_stage_becomes_a_ramdisk_whatever_dates_and_owners_its_files_have(tmp_path: Path) -> None:
    files = {"run.json": b"{}", "weights/model.safetensors": b"w" * 9}
    first = build.stage_ramdisk(_stage(tmp_path / "first", files))
    second_directory = _stage(tmp_path / "second", dict(reversed(files.items())))
    (second_directory / "run.json").chmod(0o600)
    assert build.stage_ramdisk(second_directory) == first
    assert [entry.path for entry in cpio.unpack(first)] == [
        "stage",
        "stage/run.json",
        "stage/weights",
        "stage/weights/model.safetensors",
    ]


def test_stage_without_a_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"run\.json"):
        build.stage_ramdisk(tmp_path)


def test_image_has_its_parts_in_measured_order() -> None:
    image = build.build_image(_KERNEL, "quiet", [b"a", b"b"], {"x": 1}, memory_bytes=5, cpus=3)
    assert [section.type.name for section in image.sections] == [
        "KERNEL",
        "CMDLINE",
        "RAMDISK",
        "RAMDISK",
        "METADATA",
    ]
    assert (image.default_memory_bytes, image.default_cpus) == (5, 3)
    assert image.of_type(eif.SectionType.METADATA) == (b'{"x":1}',)


@pytest.mark.parametrize("cmdline", ["a\0b", "a\nb", "é", "x" * 1025])
def test_unfit_command_line_is_refused(cmdline: str) -> None:
    with pytest.raises(BuildError, match="command line"):
        build.build_image(_KERNEL, cmdline, [b"a"], {})


def test_something_that_is_no_kernel_is_refused() -> None:
    with pytest.raises(BuildError, match="bzImage"):
        build.build_image(b"\x7fELF" + bytes(600), "quiet", [b"a"], {})


def test_code_ramdisk_is_the_same_twice_and_holds_init() -> None:
    first = build.code_ramdisk()
    assert build.code_ramdisk() == first
    init = next(entry for entry in cpio.unpack(first) if entry.path == "init")
    assert init.mode & 0o111
    assert bytes(init.data).startswith(b"#!/usr/bin/python3 ")


def test_unpinned_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"lacks .*libc6"):
        build.find_system(tmp_path, with_wheels=False)
    (tmp_path / "tools/debs").mkdir(parents=True)
    (tmp_path / "tools/debs/libc6.deb").write_bytes(b"another libc")
    with pytest.raises(BuildError, match=r"lacks .*libc6"):
        build.find_system(tmp_path, with_wheels=False)


def test_pinned_wheels_have_the_versions_everything_else_is_installed_with() -> None:
    def pins(path: Path) -> dict[str, str]:
        found = re.findall(r"(?m)^([\w.-]+)==([\w.]+)", path.read_text())
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}

    constraints = pins(build.PROJECT_ROOT / "constraints.txt")
    locked = pins(build.RECIPES / "python.lock")
    assert "torch" in locked
    assert {name: constraints[name] for name in locked} == locked


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    def failing() -> object:
        yield b"new"
        raise RuntimeError("interrupted")

    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="interrupted"):
        build.write_atomically(target, failing())
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
