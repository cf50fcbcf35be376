from __future__ import annotations

import re
import shutil
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from enclave import build, cpio, eif, rootfs
from enclave.errors import BuildError

_KERNEL = bytes(514) + b"HdrS" + bytes(100)
_COMPILED = {"pipeline.kernels._native": b"kernels", "transport._native": b"records"}
# What torch depends on and imports only to compile graphs, or for what no stage does.
_COMPILER_OF_TORCH = {"filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy"}


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


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a fresh clone holds of the project's packages."""
    unpacked = shutil.ignore_patterns("*.so", "__pycache__")
    for package in ("enclave", "pipeline", "transport"):
        shutil.copytree(build.PROJECT_ROOT / package, tmp_path / package, ignore=unpacked)
    shutil.copy(build.PROJECT_ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def _append(path: Path) -> None:
    path.write_text(path.read_text() + "\n# edited\n")


def test_code_ramdisk_starts_with_init() -> None:
    init = next(iter(cpio.unpack(build.code_ramdisk(_COMPILED))))
    assert init.path == "init"
    assert init.mode & 0o111
    assert bytes(init.data).startswith(b"#!/usr/bin/python3 ")


def test_edits_of_what_no_stage_imports_leave_the_ramdisk_as_it_was(clone: Path) -> None:
    packed = {clone / file for file in build.code_closure(clone).files}
    others = set(clone.rglob("*.py")) - packed
    for part in ("pipeline/gateway", "pipeline/engine", "enclave/eif.py", "pipeline/cli/serve.py"):
        assert any(path.is_relative_to(clone / part) for path in others)
        assert not any(path.is_relative_to(clone / part) for path in packed)
    before = build.code_ramdisk(_COMPILED, clone)
    for path in others:
        _append(path)
    assert build.code_ramdisk(_COMPILED, clone) == before


def test_an_edit_of_what_a_stage_imports_changes_the_ramdisk_there_and_nowhere_else(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closure = build.code_closure(clone)
    monkeypatch.setattr(build, "code_closure", lambda _: closure)  # the edits import nothing

    def packed(compiled: dict[str, bytes]) -> dict[str, bytes]:
        ramdisk = build.code_ramdisk(compiled, clone)
        return {entry.path: bytes(entry.data) for entry in cpio.unpack(ramdisk)}

    before = packed(_COMPILED)
    edited = {file.parent: file for file in closure.files}.values()
    for file in edited:
        _append(clone / file)
    after = packed({**_COMPILED, "pipeline.kernels._native": b"other"})
    assert before.keys() == after.keys()
    assert {path for path in before if before[path] != after[path]} == {
        f"{rootfs.SITE_PACKAGES}/{path}"
        for path in (*edited, f"pipeline/kernels/_native{rootfs.MODULE_SUFFIX}")
    }


def test_what_lies_about_in_a_checkout_is_not_packed(clone: Path) -> None:
    before = build.code_ramdisk(_COMPILED, clone)
    for directory in {path.parent for path in clone.rglob("*.py")}:
        for name in (f"_native{rootfs.MODULE_SUFFIX}", "stray.py", "stray.pem", "config.json"):
            (directory / name).write_bytes(b"stray = 1")
        (directory / "__pycache__").mkdir()
        (directory / "__pycache__/stage.cpython-311.pyc").write_bytes(b"x")
    for path in clone.rglob("*.py"):
        path.chmod(0o755)  # modes depend on the umask of whoever cloned
    assert build.code_ramdisk(_COMPILED, clone) == before


def test_what_is_packed_is_what_a_stage_is_started_with() -> None:
    _, stage = build.ROOTS
    texts = [path.read_text() for path in (build.PROJECT_ROOT / "pipeline").rglob("*.py")]
    assert any(f'"-m", "{stage}"' in text for text in texts)


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


def test_pinned_wheels_are_those_that_the_packed_code_imports_or_their_dependencies() -> None:
    imported = packages_distributions()
    foreign = build.code_closure().foreign - sys.stdlib_module_names
    needed: set[str] = set()
    pending = [name for module in foreign for name in imported[module]]
    environment = {"python_version": "3.11", "python_full_version": "3.11.2", "extra": ""}
    while pending:
        name = canonicalize_name(pending.pop())
        if name in needed | _COMPILER_OF_TORCH:
            continue
        needed.add(name)
        for requirement in map(Requirement, requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                pending.append(requirement.name)
    lock = (build.RECIPES / "python.lock").read_text()
    assert set(re.findall(r"(?m)^([\w-]+)==", lock)) == needed


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
