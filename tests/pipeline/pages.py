"""The code of a page, as a reader would write it down."""

import re
import sys
from types import ModuleType


def written_down(page, name):
    """A module of all of a page's Python, in order."""
    module = ModuleType(name)
    sys.modules[name] = module  # where dataclasses look for their annotations
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), module.__dict__)
    return module
