"""Whoever calls a public function learns from its docstring that it raises, and what."""

import ast

from tests.sources import ROOT, parsed

# Ends of a command, which nobody calls; what only a subclass should be asked.
EXEMPT = {"SystemExit", "NotImplementedError", "typer.Exit"}


def functions():
    for package in ("transport", "pipeline", "enclave"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield from public(parsed(path), path.relative_to(ROOT).as_posix())


def public(node, place):
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.ClassDef) and not each.name.startswith("_"):
            yield from public(each, f"{place}:{each.name}")
        elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(each):
            # What making an object raises may be said of its class.
            said = [each, node] if each.name == "__init__" else [each]
            docstring = " ".join(ast.get_docstring(place) or "" for place in said)
            yield f"{place}:{each.name}", each, docstring


def is_public(function):
    """Commands are called by nobody: their docstrings are what --help prints."""
    name = function.name
    is_command = name.endswith("_command") or any(
        ".command" in ast.unparse(each) or ".callback" in ast.unparse(each)
        for each in function.decorator_list
    )
    return not is_command and (name == "__init__" or not name.startswith("_"))


def raised(function):
    """Names of what the function itself raises anew; what it only passes on is another's."""
    found, open_nodes = set(), list(function.body)
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call | ast.Name):
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(called)
            if name.rpartition(".")[2][:1].isupper():
                found.add(name)
        open_nodes += ast.iter_child_nodes(node)
    return found - EXEMPT


def test_a_public_function_that_raises_says_so():
    silent = {
        name: names
        for name, function, docstring in functions()
        if (names := raised(function)) and "aise" not in docstring
    }
    assert not silent
