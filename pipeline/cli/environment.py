"""Options from the environment: VEILPIPE_<FLAG> for each, and the names that older systems had."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import typer.main

# What gives up a protection is said where it is done, not in some profile that is forgotten.
BY_HAND_ONLY = frozenset({"--dev", "--help"})
# What click says of an option's variables, whether or not its value came from one.
CLICKS_HINT = re.compile(r" \(env var: '.*?'\)(?=[:;. ]|$)")

# By flag, what else its variable may be called.
OlderNames = Mapping[str, tuple[str, ...]]


class Command:
    """A command line whose options take variables where no flag is given."""

    def __init__(self, app: typer.Typer, older: OlderNames | None) -> None:
        """`older`: None for a command that no variable is for."""
        self._command = typer.main.get_command(app)
        # By flag; the first of them that is set counts.
        self._variables: dict[str, list[str]] = {}
        for option in _options(self._command) if older is not None else ():
            flag = option.opts[0]
            if older is not None and flag not in BY_HAND_ONLY:
                own = "VEILPIPE_" + flag.removeprefix("--").replace("-", "_").upper()
                option.envvar = self._variables[flag] = [own, *older.get(flag, ())]

    def run(self, name: str) -> object:
        """Run it. Raises whatever it raises."""
        return self._command(standalone_mode=False, prog_name=name)

    def explain(self, message: str) -> str:
        """An error's message, with the variables that what it speaks of may have come from."""
        message = CLICKS_HINT.sub("", message)
        given = {word.partition("=")[0] for word in sys.argv}
        taken = {
            flag: variable
            for flag, names in self._variables.items()
            if flag not in given and (variable := next(filter(os.environ.get, names), None))
        }
        named = [taken[flag] for flag in re.findall(r"--[a-z][a-z-]*", message) if flag in taken]
        found = dict.fromkeys(named or taken.values())
        return f"{message} (from the environment: {', '.join(found)})" if found else message


def _options(command: Any) -> Iterator[Any]:  # noqa: ANN401  (click's own, or typer's copy of it)
    yield from (each for each in command.params if each.param_type_name == "option")
    for each in getattr(command, "commands", {}).values():
        yield from _options(each)
