"""The project's own source, for tests of what is written there."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def parsed(path):
    """The module at this path; nobody may alter it, as it is everybody's."""
    return ast.parse(path.read_text())
