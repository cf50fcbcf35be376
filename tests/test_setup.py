"""What scripts/setup.sh leaves behind beside what it installs."""

import os
import shutil
import signal
import subprocess
import venv
from importlib.util import cache_from_source
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HASH = "cat scripts/locks/{base,torch-cpu,torch,cuda}.lock pyproject.toml | sha256sum | cut -c1-16"


@pytest.fixture
def checkout(tmp_path):
    """One with a single module, whose environment has all that it names: nothing."""
    root = tmp_path / "checkout"
    for room in ("scripts/locks", "pipeline", "transport"):
        (root / room).mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup.sh", root / "scripts")
    for name in ("base", "torch", "torch-cpu", "cuda"):
        (root / f"scripts/locks/{name}.lock").touch()
    (root / "pyproject.toml").touch()
    venv.create(root / ".venv")
    stamp = subprocess.run(["bash", "-c", HASH], cwd=root, capture_output=True, check=True).stdout
    (root / ".venv/.veilpipe-base").write_bytes(stamp)
    return root


def run(checkout):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("VEILPIPE_VENV", None)
    subprocess.run(
        ["bash", checkout / "scripts/setup.sh"], env=environment, check=True, timeout=300,
        stdout=subprocess.PIPE,
    )  # fmt: skip


PIP = """#!/bin/bash
case "$*" in
  *pip*) trap 'exit 1' INT TERM; echo >&"$BEGUN"; while :; do sleep 0.1; done ;;
esac
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_interrupted_is_no_failure_of_what_installs(checkout, number):
    (checkout / "scripts/locks/bench.lock").touch()
    python = checkout / ".venv/bin/python"
    python.unlink()
    python.write_text(PIP)
    python.chmod(0o755)
    reading, writing = os.pipe()
    environment = {**os.environ, "BEGUN": str(writing)}
    environment.pop("VEILPIPE_VENV", None)
    with subprocess.Popen(
        ["env", "--default-signal=INT", "bash", checkout / "scripts/setup.sh", "bench"],
        env=environment, pass_fds=[writing], start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as setup:  # fmt: skip
        os.close(writing)
        assert os.read(reading, 1)
        os.killpg(setup.pid, number)
        _, said = setup.communicate()
    os.close(reading)
    assert setup.returncode == 128 + number
    assert "error" not in said


def test_bytecode_is_there_and_that_of_the_source(checkout):
    source = checkout / "pipeline/module.py"
    bytecode = Path(cache_from_source(str(source)))
    for count, text in enumerate(("A = 1\n", "A = 'another'\n"), start=1):
        source.write_text(text)
        later = source.stat().st_mtime + 100 * count  # than the last run
        os.utime(source, (later, later))
        run(checkout)
        size = int.from_bytes(bytecode.read_bytes()[12:16], "little")  # as PEP 552 has it
        assert size == len(text)
    written = bytecode.stat().st_mtime_ns
    os.utime(source, (1, 1))
    run(checkout)
    assert bytecode.stat().st_mtime_ns == written  # nothing to do
