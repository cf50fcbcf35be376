"""What a program imports of this project, read from its sources without running them.

An image carries this and no more: what a stage cannot reach is nothing to attack inside, and an
edit to it changes no measurement.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enclave.errors import BuildError

# Beside a module that names it, such a file is read by it.
_DATA_SUFFIX: Final = ".pem"


@dataclass(frozen=True, slots=True)
class Closure:
    """All that some modules import, directly or not, in functions too.

    `files` are modules and the data they name, relative to the sources; `compiled` the names of
    extension modules; `foreign` the top-level names of what is not this project's.
    """

    files: tuple[Path, ...]
    compiled: tuple[str, ...]
    foreign: frozenset[str]


def closure(sources: Path, roots: Iterable[str], extensions: Collection[str]) -> Closure:
    """Return what the modules `roots` import; `extensions` names modules that are to be compiled.

    Raises: BuildError for a root or an import of this project that is not there, a relative import,
    and a module that is no Python.
    """
    files: set[Path] = set()
    compiled: set[str] = set()
    foreign: set[str] = set()
    pending = list(roots)
    for root in pending:
        if _source(sources, root) is None:
            raise BuildError(f"no module {root} in {sources}")
    while pending:
        name = pending.pop()
        if not (sources / name.partition(".")[0] / "__init__.py").is_file():
            foreign.add(name.partition(".")[0])
            continue
        for module in _parents_first(name):
            path = _source(sources, module)
            if path is None:
                if module in extensions:
                    compiled.add(module)
                elif module != name:  # the last part may be what a module defines
                    raise BuildError(f"{name} is imported, and there is no {module} in {sources}")
                break
            if path.relative_to(sources) not in files:
                tree = _parsed(path)
                files.add(path.relative_to(sources))
                files.update(data.relative_to(sources) for data in _data(tree, path.parent))
                pending += _imported(tree, path)
    return Closure(tuple(sorted(files)), tuple(sorted(compiled)), frozenset(foreign))


def _parents_first(name: str) -> Iterator[str]:
    """Yield `a`, `a.b` and `a.b.c` for `a.b.c`: importing the last imports them all."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _source(sources: Path, module: str) -> Path | None:
    path = sources.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((each for each in candidates if each.is_file()), None)


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), path)
    except (SyntaxError, ValueError) as error:
        raise BuildError(f"{path} is no Python: {error}") from error


def _imported(tree: ast.Module, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise BuildError(f"{path}: line {node.lineno} imports relatively")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _data(tree: ast.Module, directory: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            path = Path(node.value)
            is_name = path.suffix == _DATA_SUFFIX and path.name == node.value
            if is_name and (directory / path).is_file():
                yield directory / path
