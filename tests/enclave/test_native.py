from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from enclave import build, native
from enclave.errors import BuildError

_TABLE = """
[[tool.setuptools.ext-modules]]
name = "own._fast"
sources = ["own/fast.c"]
depends = ["own/fast.h"]
extra-compile-args = ["-O2"]
extra-link-args = ["-s"]
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "pyproject.toml").write_text(_TABLE)
    (tmp_path / "own/fast.c").write_text('#include "fast.h"\nint two(void) { return TWO; }\n')
    (tmp_path / "own/fast.h").write_text("#define TWO 2\n")
    return tmp_path


def test_modules_are_made_from_what_the_project_declares(sources: Path) -> None:
    fast = native.Extension("own._fast", ("own/fast.c", "own/fast.h"), ("-O2", "-s"))
    assert native.declared(sources) == {"own._fast": fast}


def test_every_file_and_flag_counts(sources: Path) -> None:
    fast = native.declared(sources)["own._fast"]
    digests = {fast.digest(sources), native.Extension(fast.name, fast.files, ()).digest(sources)}
    for name in fast.files:
        (sources / name).write_text("// another\n")
        digests.add(fast.digest(sources))
    assert len(digests) == 4


@pytest.mark.parametrize("text", ["", "[tool.setuptools]\next-modules = 1\n", "= no TOML"])
def test_a_project_that_declares_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(BuildError, match="does not declare"):
        native.declared(tmp_path)


def test_without_the_pinned_compiler_nothing_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"lacks .*gcc-12.*build_enclave_tools"):
        build.compiled_modules(tmp_path)


def _packages(boot: Any) -> list[Path]:
    return sorted((boot.tools / "toolchain").iterdir())


def test_what_a_caller_has_in_its_environment_is_not_compiled_in(
    boot: Any, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = native.declared(sources)["own._fast"]
    before = native.compile_extension(sources, fast, _packages(boot))
    (sources / "stdio.h").write_text("#error another\n")
    monkeypatch.setenv("CPATH", str(sources))
    monkeypatch.setenv("CFLAGS", "-O0")
    monkeypatch.chdir(sources)
    assert native.compile_extension(sources, fast, _packages(boot)) == before


def test_sources_that_do_not_compile_are_named(boot: Any, sources: Path) -> None:
    fast = native.declared(sources)["own._fast"]
    (sources / "own/fast.c").write_text('#include "undeclared.h"\n')
    (sources / "own/undeclared.h").touch()
    with pytest.raises(BuildError, match=r"fast\.c.*undeclared\.h"):
        native.compile_extension(sources, fast, _packages(boot))


def test_compiled_modules_are_the_same_wherever_they_are_compiled(
    boot: Any, tmp_path: Path
) -> None:
    caches = [tmp_path / "a", tmp_path / "another/place"]
    for cache in caches:
        cache.mkdir(parents=True)
        (cache / "tools").symlink_to(boot.tools)
    first, second = map(build.compiled_modules, caches)
    assert first == second
    assert set(first) == set(build.code_closure().compiled)
    assert all(os.fsencode(tmp_path) not in data for data in first.values())
