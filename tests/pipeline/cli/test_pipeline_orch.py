"""What a command line of the user's side imports, and what it may be."""

import json
import subprocess
import sys

import pytest
from typer.main import get_command

from pipeline.cli.pipeline_orch import OTHERS, command_line, may_name_another

# What generating has no use for, and other commands have.
NEEDLESS = {"pipeline.gateway", "pipeline.planning", "pipeline.stage", "pipeline.stego", "rich"}


def test_the_names_of_all_commands_are_known_before_they_are_imported():
    assert set(get_command(command_line(["--help"])).commands) == set(OTHERS)


@pytest.mark.parametrize(
    "arguments", [[], ["serve"], ["--help"], ["-h"], ["--dev", "serve"], ["unknown"], ["-x"]]
)
def test_whatever_may_name_another_command_is_held_against_all(arguments):
    assert may_name_another(arguments)


def test_flags_of_generating_name_no_other():
    assert not may_name_another(["--manifest", "m.json", "--text", "to serve", "--dev"])


def test_typer_is_told_of_the_flags_that_are_given_alone():
    told = get_command(command_line(["--text=--max-tokens", "--dev", "--max-tokens", "2"])).params
    assert {each.name for each in told} == {"text", "dev", "max_tokens"}


@pytest.mark.parametrize("word", ["--help", "-h", "--tex", "-vv", "--", "-1"])
def test_help_and_what_is_no_flag_are_held_against_all_flags(word):
    whole = {each.name for each in get_command(command_line(["--help"])).params}
    assert len(whole) > 50
    assert {each.name for each in get_command(command_line(["--dev", word])).params} == whole


def test_generating_imports_no_other_command(tmp_path):
    program = (
        "import json, sys; import pipeline.cli.pipeline_orch as command\n"
        "try: command.main()\n"
        "finally: print(json.dumps(list(sys.modules)))"
    )
    arguments = ["--manifest", str(tmp_path / "none"), "--text", "", "--tokenizer", "none.json"]
    found = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert "cannot read manifest" in found.stderr
    assert NEEDLESS.isdisjoint(json.loads(found.stdout))
