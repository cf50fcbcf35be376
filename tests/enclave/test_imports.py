from __future__ import annotations

from pathlib import Path

import pytest

from enclave import imports
from enclave.errors import BuildError


def _sources(directory: Path, **modules: str) -> Path:
    """Modules of the package `own`, by name; `sub__name` is `own.sub.name`."""
    for name, text in {"__init__": "", **modules}.items():
        *packages, last = name.split("__") if name.strip("_") == name else [name]
        path = directory.joinpath("own", *packages, f"{last}.py")
        for parent in path.parent, directory / "own":
            parent.mkdir(parents=True, exist_ok=True)
            (parent / "__init__.py").touch()
        path.write_text(text)
    return directory


def _files(found: imports.Closure) -> set[str]:
    return {file.as_posix() for file in found.files}


def test_what_is_imported_anywhere_and_through_others_is_found(tmp_path: Path) -> None:
    sources = _sources(
        tmp_path,
        root="import json\nfrom own.a import thing\ndef f():\n    import own.sub.late",
        a="from own import b\nclass C:\n    from numpy.linalg import norm",
        b="try:\n    import torch\nexcept ImportError:\n    pass",
        sub__late="",
        sub__unused="import own.unused",
        unused="",
    )
    found = imports.closure(sources, ["own.root"], ())
    names = ("__init__", "a", "b", "root", "sub/__init__", "sub/late")
    assert _files(found) == {f"own/{name}.py" for name in names}
    assert found.foreign == {"json", "numpy", "torch"}


def test_modules_that_import_each_other_are_found_once(tmp_path: Path) -> None:
    sources = _sources(tmp_path, a="import own.b", b="import own.a")
    found = imports.closure(sources, ["own.a"], ())
    assert [file.name for file in found.files] == ["__init__.py", "a.py", "b.py"]


def test_a_compiled_module_is_named_and_not_looked_for(tmp_path: Path) -> None:
    sources = _sources(tmp_path, a="from own._fast import add", b="from own import _fast")
    for root in ("own.a", "own.b"):
        assert imports.closure(sources, [root], {"own._fast", "own._slow"}).compiled == (
            "own._fast",
        )


def test_data_that_a_module_names_come_with_it(tmp_path: Path) -> None:
    sources = _sources(tmp_path, a="open('root.pem')", b="open('other.pem')")
    for name in ("root.pem", "other.pem", "stray.pem"):
        (tmp_path / "own" / name).touch()
    found = _files(imports.closure(sources, ["own.a"], ()))
    assert found == {"own/__init__.py", "own/a.py", "own/root.pem"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("from own.gone import x", "no own.gone"),
        ("import own.gone.deeper", "no own.gone"),
        ("from . import b", "relatively"),
        ("def", "no Python"),
        ("x = '\0'", "no Python"),
    ],
)
def test_code_that_cannot_be_followed_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(BuildError, match=reason):
        imports.closure(_sources(tmp_path, a=text), ["own.a"], ())


def test_a_root_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no module own\.gone"):
        imports.closure(_sources(tmp_path), ["own.gone"], ())
