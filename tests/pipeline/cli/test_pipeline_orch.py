"""What a command line of the user's side imports, and what it may be."""

import json
import subprocess
import sys

import pytest
from typer.main import get_command

from pipeline.cli.pipeline_orch import OTHERS, command_line, may_name_another

# What each command has no use for; torch, rich and asyncio take longer to import than all else.
NEEDLESS = {
    "pipeline_orch": ("pipeline.gateway", "pipeline.stego", "pipeline.stage", "pipeline.planning"),
    "stage_worker": ("pipeline.gateway", "pipeline.engine", "pipeline.orchestrator"),
}
NEEDLESS_TO_ALL = ("asyncio", "rich", "torch", "transformers", "safetensors")


def test_the_names_of_all_commands_are_known_before_they_are_imported():
    assert set(get_command(command_line(["--help"])).commands) == set(OTHERS)


@pytest.mark.parametrize(
    "arguments", [[], ["serve"], ["--help"], ["-h"], ["--dev", "serve"], ["unknown"], ["-x"]]
)
def test_whatever_may_name_another_command_is_held_against_all(arguments):
    assert may_name_another(arguments)


def test_flags_of_generating_name_no_other():
    assert not may_name_another(["--manifest", "m.json", "--text", "to serve", "--dev"])


@pytest.mark.parametrize("command", NEEDLESS)
def test_a_command_imports_only_what_it_needs(command, tmp_path):
    program = (
        f"import json, sys; import pipeline.cli.{command} as command\n"
        "try: command.main()\n"
        "finally: print(json.dumps(list(sys.modules)))"
    )
    missing = ["--manifest", str(tmp_path / "none"), "--text", "", "--tokenizer", "none"]
    if command == "stage_worker":
        missing = [*missing[:2], "--stage-idx", "0", "--model-dir", "none"]
    found = subprocess.run(
        [sys.executable, "-c", program, *missing], capture_output=True, text=True, check=False
    )
    assert "cannot read manifest" in found.stderr
    imported = set(json.loads(found.stdout))
    assert imported.isdisjoint({*NEEDLESS[command], *NEEDLESS_TO_ALL})
