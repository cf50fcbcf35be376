"""Options from the environment: VEILPIPE_<FLAG> for each, and the names that older systems had."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import typer.main

# What gives up a protection, and what is of one run alone, is said where it is done. A prompt or a
# message in the environment could be read in every process that is started from there.
BY_HAND_ONLY = frozenset({
    "--dev", "--help", "--allow-dial", "--text", "--text-file", "--prompt", "--prompt-file",
    "--message", "--in", "--out", "--output", "--stop",
})  # fmt: skip
# What writes files once takes no variable that is meant for whoever runs on them.
BY_HAND_COMMANDS = frozenset({"plan", "shard", "keygen"})
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
        self._spellings: dict[str, list[str]] = {}
        for option in _options(self._command) if older is not None else ():
            flag = option.opts[0]
            if older is not None and not BY_HAND_ONLY.intersection(option.opts):
                self._spellings[flag] = option.opts
                own = "VEILPIPE_" + flag.removeprefix("--").replace("-", "_").upper()
                option.envvar = self._variables[flag] = [own, *older.get(flag, ())]

    def run(self, name: str) -> object:
        """Run it. Raises whatever it raises."""
        return self._command(standalone_mode=False, prog_name=name)

    def explain(self, message: str) -> str:
        """An error's message, with the variables that what it speaks of came from."""
        message = CLICKS_HINT.sub("", message)
        given = {word.partition("=")[0] for word in sys.argv}
        words = set(re.findall(r"[a-z][a-z-]*", message.lower().replace("_", "-")))
        found = [
            variable
            for flag, names in self._variables.items()
            if flag.removeprefix("--") in words
            and given.isdisjoint(self._spellings[flag])
            and (variable := next(filter(os.environ.get, names), None))
        ]
        return f"{message} (from the environment: {', '.join(found)})" if found else message


def _options(command: Any) -> Iterator[Any]:  # noqa: ANN401  (click's own, or typer's copy of it)
    yield from (each for each in command.params if each.param_type_name == "option")
    for name, each in getattr(command, "commands", {}).items():
        if name not in BY_HAND_COMMANDS:
            yield from _options(each)
