"""The script that generates on this machine: a worker that dies ends it only where it is to."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Ports

SCRIPTS = Path(__file__).parents[2] / "scripts"
NUM_TOKENS = 1200


@pytest.fixture
def base_port():
    ports = Ports(23)
    yield ports.base
    ports.release()


def generate_and_kill_a_worker(directory, model, base_port, num_bytes, *flags):
    """Exit status, text and log, where a worker is killed after so many bytes of text."""
    scripts = directory / "scripts"
    shutil.rmtree(scripts, ignore_errors=True)
    scripts.mkdir()
    for name in ("run_local.sh", "lib.sh"):
        shutil.copy(SCRIPTS / name, scripts)
    (scripts / "setup.sh").write_text("")  # what the tests run in is set up
    text, log = directory / "text", directory / "log"
    environment = os.environ | {
        "MODEL_DIR": str(model), "VEILPIPE_VENV": sys.prefix, "VEILPIPE_DEV_DIR": str(directory),
        "BASE_PORT": str(base_port),
    }  # fmt: skip
    command = ["bash", scripts / "run_local.sh", *flags, "Hello there", str(NUM_TOKENS)]
    with text.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
    end = time.monotonic() + 60
    while text.stat().st_size < num_bytes:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.005)
    started = re.findall(r"worker_started stage=1 pid=(\d+)", log.read_text())
    os.kill(int(started[-1]), signal.SIGKILL)
    return process.wait(60), text.read_bytes(), log.read_text()


def test_a_worker_that_dies_is_replaced_unless_its_loss_is_to_end_it(
    tiny_model, tmp_path, base_port
):
    status, whole, log = generate_and_kill_a_worker(tmp_path, tiny_model, base_port, 100)
    assert status == 0, log
    assert "event=failover_complete" in log
    assert f"latency: {NUM_TOKENS} tokens" in log
    status, begun, log = generate_and_kill_a_worker(
        tmp_path, tiny_model, base_port, 600, "--exit-on-loss"
    )
    assert status == 1, log
    assert "error: stage 1 is lost" in log.splitlines()[-1]
    assert len(begun) < len(whole)
    assert whole.startswith(begun)
