"""Bars are for a terminal that somebody sits before, and for nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ORCH = Path(sys.executable).parent / "pipeline-orch"
WORKER = Path(sys.executable).parent / "stage-worker"
ON_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
BAR = "hashing weights"


@pytest.fixture
def plan(tiny_model, tmp_path):
    return [ORCH, "plan", "--model-dir", tiny_model, "--stages", "2", "-o", tmp_path / "m.json"]


def on_a_terminal(*command, term="xterm"):
    """What a terminal is shown that the command runs on, and its exit code."""
    result = subprocess.run(
        [sys.executable, "-c", ON_A_TERMINAL, *map(str, command)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        env=os.environ | {"TERM": term},
    )  # fmt: skip
    return result.stdout, result.returncode


def test_a_terminal_is_shown_how_far_hashing_and_cutting_are(plan, tiny_model, tmp_path):
    shown, code = on_a_terminal(*plan)
    assert code == 0
    assert BAR in shown
    assert "wrote" in shown.splitlines()[-1]
    shown, code = on_a_terminal(
        ORCH, "shard", "--manifest", tmp_path / "m.json", "--model-dir", tiny_model,
        "-o", tmp_path / "shards",
    )  # fmt: skip
    assert code == 0
    assert "cutting weights" in shown


def test_a_terminal_is_shown_how_far_attacks_are(tiny_model):
    shown, code = on_a_terminal(
        ORCH, "leakage", "--mode", "plain", "--model-dir", tiny_model, "--texts", "2",
        "--tokens", "4",
    )  # fmt: skip
    assert code == 0
    assert "loading weights" in shown
    assert "attacking plain" in shown


def test_a_worker_shows_how_far_loading_is_unless_it_is_one_of_several(tiny_model, plan, tmp_path):
    subprocess.run(plan, check=True, capture_output=True, timeout=300)
    worker = [
        WORKER, "--manifest", tmp_path / "m.json", "--stage-idx", "0", "--model-dir", tiny_model,
        "--control-listen", "0.0.0.1:1", "--dev",  # where nobody can listen, so that it ends
    ]  # fmt: skip
    assert "loading weights" in on_a_terminal(*worker)[0]
    assert "loading weights" not in on_a_terminal(*worker, "--supervised")[0]
    assert "loading weights" not in on_a_terminal(*worker, "--log-format", "json")[0]


def test_a_terminal_that_can_only_print_is_shown_none(plan):
    shown, code = on_a_terminal(*plan, term="dumb")
    assert code == 0
    assert "\x1b" not in shown
    assert "%" not in shown


def test_no_pipe_or_file_is_given_any(plan):
    result = subprocess.run(plan, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0
    *stages, written = result.stderr.splitlines()
    assert written.startswith("pipeline-orch: wrote ")
    assert all(line.startswith("pipeline-orch: stage ") for line in stages)
    assert "\r" not in result.stderr
