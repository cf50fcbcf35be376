"""The operations manual: its units and probes are what systemd and the server take."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

import pipeline.cli
from pipeline.cli import stage_worker
from pipeline.cli.pipeline_orch import command_line
from pipeline.gateway.http.middleware import OPEN_PATHS

MANUAL = (Path(pipeline.cli.__file__).parent / "OPERATIONS.md").read_text()
UNITS = re.findall(r"```ini\n(.*?)```", MANUAL, re.DOTALL)


def options(unit):
    """The command of a unit, and its words that begin with dashes."""
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, *words = line.split()
    return Path(program).name, {word for word in words if word.startswith("--")}


@pytest.mark.parametrize("unit", UNITS, ids=["stage", "server"])
def test_units_give_commands_flags_that_they_have(unit):
    program, given = options(unit)
    command = get_command(stage_worker.app)
    if program == "pipeline-orch":
        command = get_command(command_line(["serve"])).commands["serve"]
    known = {name for parameter in command.params for name in parameter.opts}
    assert given
    assert given <= known


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
@pytest.mark.parametrize("unit", UNITS, ids=["stage", "server"])
def test_systemd_finds_nothing_wrong_with_units(unit, tmp_path):
    path = tmp_path / "veilpipe@0.service"
    path.write_text(re.sub(r"/opt/veilpipe/bin/\S+", "/bin/true", unit))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False
    )
    assert not [line for line in found.stderr.splitlines() if path.name in line]


def test_probes_ask_for_what_needs_no_key():
    paths = set(re.findall(r"path: (/\w+)", MANUAL))
    assert paths
    assert paths <= OPEN_PATHS


def test_the_grace_of_units_and_pods_ends_before_they_are_killed():
    (grace,) = map(int, re.findall(r"--grace (\d+)", MANUAL))
    limits = re.findall(r"(?:TimeoutStopSec=|GracePeriodSeconds: )(\d+)", MANUAL)
    assert len(limits) == 2
    assert all(int(limit) >= grace + 10 for limit in limits)
