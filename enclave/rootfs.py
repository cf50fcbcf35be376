"""The root file system of an image, put together from pinned Debian packages and wheels.

No package manager, shell or script of a package runs or gets in: archives are unpacked, pruned and
merged. The result depends on the pinned files and the project's own sources alone.
"""

from __future__ import annotations

import io
import lzma
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from enclave import cpio
from enclave.errors import BuildError

SITE_PACKAGES: Final = "usr/local/lib/python3.11/dist-packages"
MODULE_SUFFIX: Final = ".cpython-311-x86_64-linux-gnu.so"

# -I: no environment, no user packages; -B: nothing is written next to the sources.
_INIT: Final = b"#!/usr/bin/python3 -IB\nfrom enclave.init import main\n\nmain()\n"

_SKELETON: Final = (
    *(cpio.directory(path) for path in ("dev", "proc", "root", "run", "stage", "sys")),
    cpio.directory("tmp", 0o1777),
    cpio.Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
    cpio.Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
    cpio.regular("etc/passwd", b"root:x:0:0:root:/root:/nonexistent\n"),
    cpio.regular("etc/group", b"root:x:0:\n"),
    cpio.regular("etc/hosts", b"127.0.0.1 localhost\n"),
    cpio.regular("etc/nsswitch.conf", b"hosts: files\n"),
)

# Nothing of this is needed to run a stage; torch alone shrinks by a third.
_PRUNED: Final = re.compile(
    r"""
    ^usr/share/(?!python) | ^etc/(?!ld\.so) | ^usr/lib/x86_64-linux-gnu/gconv/
    | ^usr/lib/python3\.11/(?:idlelib|lib2to3|pydoc_data|tkinter|turtledemo|ensurepip|test)/
    | ^usr/lib/valgrind/ | ^usr/share/gdb/
    | (?:^|/)__pycache__/ | \.pyi$ | \.a$ | \.pyx$ | \.pxd$ | \.h$ | \.hpp$ | \.cuh$
    | /dist-packages/torch/(?:include|share|test)/
    | /dist-packages/torch/bin/(?!torch_shm_manager$)
    | /dist-packages/(?:numpy|sympy|networkx|mpmath)/(?:.*/)?tests?/
    """,
    re.VERBOSE,
)


def system_entries(debs: Iterable[Path], wheels: Iterable[Path]) -> list[cpio.Entry]:
    """Return the entries of the system: an empty skeleton, Debian packages, Python packages.

    Raises: BuildError when an archive cannot be read or two of them hold the same file.
    """
    return _merge(
        [
            ("skeleton", _SKELETON),
            *((deb.name, _kept(deb_entries(deb))) for deb in debs),
            *((wheel.name, _kept(wheel_entries(wheel))) for wheel in wheels),
        ]
    )


def code_entries(
    sources: Path, files: Iterable[Path], compiled: Mapping[str, bytes]
) -> list[cpio.Entry]:
    """Return init and what `module_entries` does. Raises: OSError when a file cannot be read."""
    return [cpio.regular("init", _INIT, 0o755), *module_entries(sources, files, compiled)]


def module_entries(
    sources: Path, files: Iterable[Path], compiled: Mapping[str, bytes]
) -> list[cpio.Entry]:
    """Return the project's `files` (relative to `sources`) and its compiled modules by name.

    Raises: OSError when a file cannot be read.
    """
    return [
        *(
            cpio.regular(f"{SITE_PACKAGES}/{file.as_posix()}", (sources / file).read_bytes())
            for file in files
        ),
        *(
            cpio.regular(f"{SITE_PACKAGES}/{name.replace('.', '/')}{MODULE_SUFFIX}", data)
            for name, data in compiled.items()
        ),
    ]


def tree_entries(directory: Path, prefix: str) -> Iterator[cpio.Entry]:
    """Yield the regular files below `directory`, modes reduced to readable or executable.

    Raises: BuildError for a symbolic link or a special file, which may lead out of the directory.
    """
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise BuildError(f"{path} is no regular file")
        name = f"{prefix}/{path.relative_to(directory).as_posix()}"
        yield cpio.regular(name, path.read_bytes(), 0o755 if mode & 0o100 else 0o644)


def deb_entries(path: Path) -> Iterator[cpio.Entry]:
    """Yield what a Debian package installs; its maintainer scripts are left out, unread.

    Raises: BuildError when it cannot be read.
    """
    try:
        data = _ar_member(path.read_bytes(), b"data.tar.xz")
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data))) as archive:
            for member in archive:
                entry = _tar_entry(archive, member)
                if entry is not None:
                    yield entry
    except (OSError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
        raise BuildError(f"cannot read package {path}: {error}") from error


def wheel_entries(path: Path) -> Iterator[cpio.Entry]:
    """Yield what a wheel installs into the site directory; its console scripts are left out.

    Raises: BuildError when it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = _wheel_target(member.filename)
                if name is None or member.is_dir():
                    continue
                mode = 0o755 if member.external_attr >> 16 & 0o100 else 0o644
                yield cpio.regular(f"{SITE_PACKAGES}/{name}", archive.read(member), mode)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BuildError(f"cannot read wheel {path}: {error}") from error


def _kept(entries: Iterable[cpio.Entry]) -> Iterator[cpio.Entry]:
    return (entry for entry in entries if not _PRUNED.search(entry.path))


def _merge(parts: Iterable[tuple[str, Iterable[cpio.Entry]]]) -> list[cpio.Entry]:
    merged: dict[str, cpio.Entry] = {}
    for origin, entries in parts:
        for entry in entries:
            other = merged.setdefault(entry.path, entry)
            if other is not entry and not (stat.S_ISDIR(other.mode) and stat.S_ISDIR(entry.mode)):
                raise BuildError(f"{origin}: {entry.path} is there already")
    return list(merged.values())


def _wheel_target(name: str) -> str | None:
    """Return where a wheel's file goes below the site directory. Source: PEP 427."""
    head, _, rest = name.partition("/")
    if not head.endswith(".data"):
        return name
    scheme, _, rest = rest.partition("/")
    return rest if scheme in {"purelib", "platlib"} else None


def _tar_entry(archive: tarfile.TarFile, member: tarfile.TarInfo) -> cpio.Entry | None:
    path = member.name.removeprefix("./").strip("/")
    if path in {"", "."}:
        return None
    if member.isdir():
        return cpio.directory(path, member.mode & 0o1777)
    if member.issym():
        return cpio.symlink(path, member.linkname)
    if member.isreg() or member.islnk():
        file = archive.extractfile(member)
        # Set-id bits are dropped: everything in an enclave runs as one user anyway.
        return cpio.regular(path, file.read() if file else b"", member.mode & 0o755)
    raise BuildError(f"{member.name} is no file, link or directory")


def _ar_member(archive: bytes, wanted: bytes) -> bytes:
    """Return one member of a Unix ar archive. Source: deb(5), ar(5). Raises: ValueError."""
    if not archive.startswith(b"!<arch>\n"):
        raise ValueError("not an ar archive")
    at = 8
    while at + 60 <= len(archive):
        name, size = archive[at : at + 16].rstrip(b" /"), int(archive[at + 48 : at + 58])
        if name == wanted:
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"no {wanted.decode()} inside")
