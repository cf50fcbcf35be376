from __future__ import annotations

import io
import lzma
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from enclave import cpio, rootfs
from enclave.errors import BuildError

_SITE = rootfs.SITE_PACKAGES


def _deb(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size, member.mode, member.mtime, member.uid = len(content), 0o4755, 12345, 77
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(f"./{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    members = {b"debian-binary": b"2.0\n", b"data.tar.xz": lzma.compress(data.getvalue())}
    out = b"!<arch>\n"
    for name, content in members.items():
        header = name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8)
        out += header + str(len(content)).encode().ljust(10) + b"`\n" + content
        out += b"\n" * (len(content) % 2)
    path.write_bytes(out)
    return path


def _wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _by_path(entries: list[cpio.Entry]) -> dict[str, cpio.Entry]:
    return {entry.path: entry for entry in entries}


def test_system_holds_packages_and_wheels_without_their_owners_dates_or_set_id_bits(
    tmp_path: Path,
) -> None:
    deb = _deb(tmp_path / "a.deb", {"usr/bin/tool": b"tool"}, {"usr/bin/alias": "tool"})
    wheel = _wheel(tmp_path / "b.whl", {"b/__init__.py": b"pass", "b-1.data/purelib/c.py": b"c"})
    system = _by_path(rootfs.system_entries([deb], [wheel]))
    assert bytes(system["usr/bin/tool"].data) == b"tool"
    assert stat.S_IMODE(system["usr/bin/tool"].mode) == 0o755
    assert bytes(system["usr/bin/alias"].data) == b"tool"
    assert stat.S_ISLNK(system["usr/bin/alias"].mode)
    assert bytes(system[f"{_SITE}/b/__init__.py"].data) == b"pass"
    assert bytes(system[f"{_SITE}/c.py"].data) == b"c"
    assert stat.S_ISCHR(system["dev/console"].mode)


@pytest.mark.parametrize(
    "path",
    [
        "usr/share/doc/a/copyright",
        "etc/shadow",
        "usr/lib/python3.11/test/big.py",
        f"{_SITE}/torch/include/c10/a.h",
        f"{_SITE}/torch/bin/protoc",
        f"{_SITE}/numpy/linalg/tests/test_a.py",
        f"{_SITE}/a/__pycache__/b.cpython-311.pyc",
    ],
)
def test_what_no_stage_needs_is_left_out(tmp_path: Path, path: str) -> None:
    assert path not in _by_path(rootfs.system_entries([_deb(tmp_path / "a.deb", {path: b"x"})], []))


@pytest.mark.parametrize(
    "path",
    [
        f"{_SITE}/torch/testing/__init__.py",
        f"{_SITE}/torch/bin/torch_shm_manager",
        f"{_SITE}/torchgen/model.py",
        "usr/share/python3/runtime.d/a",
    ],
)
def test_what_looks_superfluous_but_is_needed_stays(tmp_path: Path, path: str) -> None:
    assert path in _by_path(rootfs.system_entries([_deb(tmp_path / "a.deb", {path: b"x"})], []))


def test_two_packages_with_the_same_file_are_refused(tmp_path: Path) -> None:
    debs = [_deb(tmp_path / name, {"usr/bin/tool": b"x"}) for name in ("a.deb", "b.deb")]
    with pytest.raises(BuildError, match=r"b\.deb: usr/bin/tool is there already"):
        rootfs.system_entries(debs, [])


@pytest.mark.parametrize("content", [b"", b"no archive", b"!<arch>\n", b"!<arch>\n" + b"x" * 60])
def test_damaged_package_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.deb").write_bytes(content)
    with pytest.raises(BuildError, match=r"a\.deb"):
        rootfs.system_entries([tmp_path / "a.deb"], [])


def test_damaged_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"no archive")
    with pytest.raises(BuildError, match=r"a\.whl"):
        rootfs.system_entries([], [tmp_path / "a.whl"])


def test_code_is_init_the_named_files_and_the_compiled_modules(tmp_path: Path) -> None:
    for name in ("a.py", "root.pem", "other.py"):
        (tmp_path / "package").mkdir(exist_ok=True)
        (tmp_path / "package" / name).write_bytes(name.encode())
        (tmp_path / "package" / name).chmod(0o700)
    files = [Path("package/a.py"), Path("package/root.pem")]
    code = _by_path(rootfs.code_entries(tmp_path, files, {"package._native": b"compiled"}))
    assert {path: bytes(entry.data) for path, entry in code.items() if path != "init"} == {
        f"{_SITE}/package/a.py": b"a.py",
        f"{_SITE}/package/root.pem": b"root.pem",
        f"{_SITE}/package/_native.cpython-311-x86_64-linux-gnu.so": b"compiled",
    }
    assert stat.S_IMODE(code[f"{_SITE}/package/a.py"].mode) == 0o644


def test_stage_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(BuildError, match="no regular file"):
        list(rootfs.tree_entries(tmp_path, "stage"))
