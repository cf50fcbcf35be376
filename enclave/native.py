"""The project's compiled modules for an image: from their sources, by one pinned compiler.

What a checkout has compiled for its own Python is not looked at: whose compiler that was, and with
which flags, no measurement could tell.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from enclave import rootfs
from enclave.errors import BuildError

_COMPILER: Final = "usr/bin/x86_64-linux-gnu-gcc-12"
# What Python's own way of building extension modules adds to the flags declared.
_FLAGS: Final = ("-shared", "-fPIC", "-DNDEBUG", "-fwrapv", "-I=/usr/include/python3.11")


@dataclass(frozen=True, slots=True)
class Extension:
    """A compiled module as pyproject.toml declares it; `files` are all that it is made from."""

    name: str
    files: tuple[str, ...]
    flags: tuple[str, ...]

    def digest(self, sources: Path) -> bytes:
        """Return a SHA-256 over all the module depends on but the compiler. Raises: OSError."""
        contents = [
            hashlib.sha256((sources / file).read_bytes()).hexdigest() for file in self.files
        ]
        words = json.dumps([self.name, self.files, contents, _FLAGS, self.flags])
        return hashlib.sha256(words.encode()).digest()


def declared(sources: Path) -> dict[str, Extension]:
    """Return the compiled modules that pyproject.toml declares, by name. Raises: BuildError."""
    path = sources / "pyproject.toml"
    try:
        tables = tomllib.loads(path.read_text())["tool"]["setuptools"]["ext-modules"]
        return {table["name"]: _extension(table) for table in tables}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{path} does not declare compiled modules: {error}") from error


def compile_extension(sources: Path, extension: Extension, toolchain: Iterable[Path]) -> bytes:
    """Return the compiled module; `toolchain` are the Debian packages of the compiler.

    Compiled apart, from just the files declared, so that nothing else can have a part in it.
    Raises: BuildError when the compiler does not run, or refuses the sources; OSError when a file
    cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="veilpipe-compile-") as name:
        root, work = Path(name, "toolchain"), Path(name, "work")
        for package in toolchain:
            _unpack(package, root)
        for file in extension.files:
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sources / file, work / file)
        units = [file for file in extension.files if file.endswith(".c")]
        command = [root / _COMPILER, f"--sysroot={root}", *_FLAGS, *extension.flags, *units]
        _run([*map(str, command), "-o", "module.so"], root, work)
        return (work / "module.so").read_bytes()


def _extension(table: dict[str, Any]) -> Extension:
    # The linker takes its flags among the compiler's; each knows its own.
    flags = (*table.get("extra-compile-args", ()), *table.get("extra-link-args", ()))
    return Extension(table["name"], (*table["sources"], *table.get("depends", ())), flags)


def _unpack(package: Path, root: Path) -> None:
    for entry in rootfs.deb_entries(package):
        path = root / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if stat.S_ISDIR(entry.mode):
            path.mkdir(exist_ok=True)
        elif stat.S_ISLNK(entry.mode):
            path.symlink_to(bytes(entry.data).decode())
        else:
            path.write_bytes(entry.data)
            path.chmod(stat.S_IMODE(entry.mode))


def _run(command: list[str], root: Path, work: Path) -> None:
    # Nothing of the caller's environment: variables such as CPATH change what is compiled.
    environment = {
        "PATH": str(root / "usr/bin"),
        "LD_LIBRARY_PATH": str(root / "usr/lib/x86_64-linux-gnu"),
        "TMPDIR": str(work),
    }
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise BuildError(f"the compiler does not run: {error.strerror}") from error
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise BuildError(f"the compiler refuses the sources: {first}")
